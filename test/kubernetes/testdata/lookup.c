// What probe/main.go does, with getaddrinfo: with glibc or musl.
#include <arpa/inet.h>
#include <netdb.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static double now(clockid_t c) {
	struct timespec t;
	clock_gettime(c, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static int compare(const void *a, const void *b) { return strcmp(a, b); }

static int ended(void) {
	char buffer[64];
	struct pollfd p = {.fd = 0, .events = POLLIN};
	return poll(&p, 1, 2) > 0 && read(0, buffer, sizeof buffer) <= 0;
}

// What a lookup takes at least when a packet was lost: the resolver waits before it asks again.
#ifdef __GLIBC__
enum { octet = 11 };
static const double lost = 4.9;
#else
enum { octet = 12 };
static const double lost = 2.4;
#endif

// Replaces a # at the name's begin by another address each time, as in the names of pods: no other program, and no run of minutes
// ago, has the same.
static const char *fresh(const char *name, char *buffer, size_t size) {
	static unsigned n;
	if (name[0] != '#')
		return name;
	if (!n)
		n = (long)(now(CLOCK_REALTIME) * 250);
	n++;
	snprintf(buffer, size, "%d-%u-%u-%u%s", octet, n >> 16 & 255, n >> 8 & 255, n & 255, name + 1);
	return buffer;
}

int main(int argc, char **argv) {
	int until_eof = argc > 1 && !strcmp(argv[1], "-until-eof"), times = argc > 2 && !strcmp(argv[1], "-times") ? atoi(argv[2]) : 0;
	int many = until_eof || times, first = 1 + until_eof + 2 * (times > 0);
	long lookups = 0, failed = 0, over_long = 0, count_lost = 0;
	do {
		for (int i = first; i < argc; i++) {
			struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *all = NULL;
			char text[64][INET6_ADDRSTRLEN], buffer[256];
			const char *name = fresh(argv[i], buffer, sizeof buffer);
			int n = 0;
			double wall = now(CLOCK_REALTIME), begin = now(CLOCK_MONOTONIC);
			int err = getaddrinfo(name, NULL, &hints, &all);
			double took = now(CLOCK_MONOTONIC) - begin;
			lookups++;
			failed += err != 0;
			over_long += took > 1;
			count_lost += took > lost;
			if (many && !err && took <= 1) {
				freeaddrinfo(all);
				continue;
			}
			if (many)
				printf("%02d:%02d:%06.3f ", (int)(wall / 3600) % 24, (int)(wall / 60) % 60, wall - (long)(wall / 60) * 60);
			printf("%s:", name);
			if (err)
				printf(" failed: %s", gai_strerror(err));
			else
				for (struct addrinfo *p = all; p && n < 64; p = p->ai_next)
					inet_ntop(p->ai_family,
						p->ai_family == AF_INET ? (void *)&((struct sockaddr_in *)p->ai_addr)->sin_addr : (void *)&((struct sockaddr_in6 *)p->ai_addr)->sin6_addr,
						text[n++], sizeof text[0]);
			qsort(text, n, sizeof text[0], compare);
			for (int k = 0; k < n; k++)
				if (!k || strcmp(text[k], text[k - 1]))
					printf(" %s", text[k]);
			if (many)
				printf(" (%.0f ms)", took * 1e3);
			printf("\n");
			fflush(stdout);
			if (all)
				freeaddrinfo(all);
		}
	} while (until_eof ? !ended() : --times > 0 && !poll(NULL, 0, 2));
	if (many)
		printf("%ld lookups, %ld failed, %ld over 1 s, %ld lost\n", lookups, failed, over_long, count_lost);
	return 0;
}
