// Package udp receives and sends UDP packets in batches, on sockets that share their address with sockets of other
// owners.
//
// A Group opens its sockets on an address on which others are open already, all with SO_REUSEPORT. It gives the kernel
// a program that chooses a socket for each packet: one of the group's, which has one for each worker, for a plain DNS
// query, and one of the others for everything else.
//
// The program chooses a socket by its number, in the order of opening. The sockets that were open before the group's
// first one have the lowest numbers, and the group's come next. Sockets that other processes open later have higher
// numbers, and the program does not choose them. When a socket closes, the kernel moves the last one into its place.
// Numbers are then wrong; Standing reports that, and the owner replaces the group.
//
// Drain takes the program away and connects the group's sockets. The kernel then chooses by hash among the others. Each
// packet that the group has received can still be answered before the group is closed.
//
// A Batch takes the packets that a socket has received, up to its size, in one system call (recvmmsg), and sends the
// replies in another one (sendmmsg). Neither allocates memory for a packet.
//
// All of this needs Linux; elsewhere the package is empty.
package udp
