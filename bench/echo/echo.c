// Command echo is the least that a DNS server can do: it answers every packet with itself, marked as a
// response, with recvmmsg(2) and sendmmsg(2). What it costs is the kernel's part of a UDP query.
//
//     cc -O2 -o echo bench/echo/echo.c && ./echo 127.0.0.1 5353
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { BATCH = 64, SIZE = 512 };

int main(int argc, char **argv) {
	if (argc != 3) {
		fprintf(stderr, "usage: echo ADDRESS PORT\n");
		return 2;
	}
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
	if (inet_pton(AF_INET, argv[1], &at.sin_addr) != 1) {
		fprintf(stderr, "echo: %s is no address\n", argv[1]);
		return 2;
	}
	int fd = socket(AF_INET, SOCK_DGRAM, 0), buffer = 4 << 20;
	setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof buffer);
	if (bind(fd, (struct sockaddr *)&at, sizeof at) < 0) {
		perror("echo: address already in use?");
		return 1;
	}
	// So that who asks whether there is a server finds one.
	int tcp = socket(AF_INET, SOCK_STREAM, 0);
	if (bind(tcp, (struct sockaddr *)&at, sizeof at) < 0 || listen(tcp, 16) < 0) {
		perror("echo: address already in use?");
		return 1;
	}
	static char packets[BATCH][SIZE];
	static struct sockaddr_in from[BATCH];
	static struct iovec vec[BATCH];
	static struct mmsghdr in[BATCH];
	for (;;) {
		for (int i = 0; i < BATCH; i++) {
			vec[i] = (struct iovec){packets[i], SIZE};
			in[i].msg_hdr = (struct msghdr){.msg_name = &from[i], .msg_namelen = sizeof from[i], .msg_iov = &vec[i], .msg_iovlen = 1};
		}
		int n = recvmmsg(fd, in, BATCH, MSG_WAITFORONE, NULL);
		for (int i = 0; i < n; i++) {
			packets[i][2] |= 0x80; // QR
			vec[i].iov_len = in[i].msg_len;
		}
		for (int sent = 0; sent < n;) {
			int k = sendmmsg(fd, in + sent, n - sent, 0);
			sent += k > 0 ? k : 1;
		}
	}
}
