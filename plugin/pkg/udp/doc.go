// Package udp receives and sends UDP packets in batches, on sockets that share their address with
// those of somebody else.
//
// A Group opens its sockets on an address where others are open already, all with SO_REUSEPORT,
// and gives the kernel a program that says which packet goes to which of them: plain DNS queries to
// the group's, one of them for each worker, and everything else to the others. When the group closes,
// or one of its sockets does, the kernel goes back to the others, and nobody notices.
//
// A Batch takes the packets that a socket has received, up to its size, in one system call
// (recvmmsg), and sends the replies in another one (sendmmsg). Nothing is allocated for a packet.
//
// Everything here needs Linux; elsewhere the package is empty.
package udp
