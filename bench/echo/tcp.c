// Command tcp is the least that a DNS server can do by TCP: it answers what a read has brought with itself, marked as a response,
// with one write, in an epoll(7) loop. It takes each read for whole messages, which those of dnsperf are.
//
//     cc -O2 -o tcp bench/echo/tcp.c && ./tcp 127.0.0.1 5353
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv) {
	if (argc != 3) {
		fprintf(stderr, "usage: tcp ADDRESS PORT\n");
		return 2;
	}
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
	if (inet_pton(AF_INET, argv[1], &at.sin_addr) != 1) {
		fprintf(stderr, "tcp: %s is no address\n", argv[1]);
		return 2;
	}
	int l = socket(AF_INET, SOCK_STREAM, 0), u = socket(AF_INET, SOCK_DGRAM, 0), one = 1;
	setsockopt(l, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	// The socket for UDP is there so that who asks whether there is a server finds one.
	if (bind(l, (struct sockaddr *)&at, sizeof at) < 0 || listen(l, 1024) < 0 || bind(u, (struct sockaddr *)&at, sizeof at) < 0) {
		perror("tcp: address already in use?");
		return 1;
	}
	int e = epoll_create1(0);
	struct epoll_event want = {.events = EPOLLIN, .data.fd = l}, got[256];
	epoll_ctl(e, EPOLL_CTL_ADD, l, &want);
	want.data.fd = u;
	epoll_ctl(e, EPOLL_CTL_ADD, u, &want);
	static unsigned char p[65536];
	for (;;) {
		int n = epoll_wait(e, got, 256, -1);
		for (int i = 0; i < n; i++) {
			int fd = got[i].data.fd;
			if (fd == l) {
				int c = accept4(l, NULL, NULL, SOCK_NONBLOCK);
				setsockopt(c, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
				want.data.fd = c;
				epoll_ctl(e, EPOLL_CTL_ADD, c, &want);
				continue;
			}
			if (fd == u) {
				struct sockaddr_in from;
				socklen_t size = sizeof from;
				ssize_t k = recvfrom(u, p, sizeof p, 0, (struct sockaddr *)&from, &size);
				p[2] |= 0x80; // QR
				if (k > 0) sendto(u, p, k, 0, (struct sockaddr *)&from, size);
				continue;
			}
			ssize_t k = read(fd, p, sizeof p);
			if (k <= 0) {
				close(fd);
				continue;
			}
			for (ssize_t at = 0; at + 4 < k; at += 2 + (p[at] << 8 | p[at + 1])) p[at + 4] |= 0x80; // QR
			if (write(fd, p, k) < 0) close(fd);
		}
	}
}
