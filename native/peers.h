/* How many connections each address has, and whether it has ever shown a credential that was good.
 *
 * Memory is bounded when the table is made: an address that has a connection holds one entry, so `capacity` at or above
 * the most connections that there can be is enough, and what is left of it remembers addresses that have authenticated
 * and gone, the latest ones. An address that never authenticated is forgotten with its last connection, so nobody can
 * push others out of the table by coming from many addresses. The hash is keyed: collisions cannot be computed.
 *
 * IPv4 addresses count one by one, IPv6 addresses by their first 64 bits, which is the least that one caller is given.
 */
#ifndef ASC_PEERS_H
#define ASC_PEERS_H

#include <stdbool.h>
#include <stdint.h>

typedef struct asc_peers asc_peers;

typedef struct {
    uint64_t prefix;
    uint32_t connections;
    uint32_t next;          /* of its bucket, or of the free list; indices + 1, 0 ends */
    uint32_t older, newer;  /* authenticated and without a connection: by age */
    bool v4, authenticated;
} asc_peer;

enum peers_verdict { PEERS_WELCOME, PEERS_TOO_MANY, PEERS_TOO_MANY_UNAUTHENTICATED, PEERS_NO_ROOM };

/* NULL: no memory. The seed is secret and random. */
asc_peers *peers_new(uint32_t capacity, const uint64_t seed[2]);
void peers_free(asc_peers *peers);

/* One more connection from `address` (16 bytes, IPv4 as ::ffff:a.b.c.d), unless it has `most` already, or `most_unauthenticated`
 * and none of its requests was ever good. *peer is its entry until peers_leave; NULL with any verdict but PEERS_WELCOME. */
enum peers_verdict peers_enter(asc_peers *peers, const uint8_t address[16], uint64_t most, uint64_t most_unauthenticated,
                               asc_peer **peer);
void peers_leave(asc_peers *peers, asc_peer *peer);

/* Whether the first `bits` of both addresses are the same. */
bool peers_within(const uint8_t address[16], const uint8_t network[16], unsigned bits);

#endif
