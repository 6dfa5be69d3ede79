/* units: peers.c */
/* Connections by address: the caps, what is remembered and what is not, and a table that never grows. */
#include "../peers.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const uint64_t SEED[2] = {0x9e3779b97f4a7c15ull, 0xbf58476d1ce4e5b9ull};

static const uint8_t *v4(uint32_t number)
{
    static uint8_t address[16] = {[10] = 0xff, [11] = 0xff};
    for (unsigned i = 0; i < 4; i++)
        address[12 + i] = (uint8_t)(number >> (24 - 8 * i));
    return address;
}

static const uint8_t *v6(uint64_t prefix, uint64_t host)
{
    static uint8_t address[16];
    for (unsigned i = 0; i < 8; i++) {
        address[i] = (uint8_t)(prefix >> (56 - 8 * i));
        address[8 + i] = (uint8_t)(host >> (56 - 8 * i));
    }
    return address;
}

static void caps(void)
{
    asc_peers *peers = peers_new(64, SEED);
    asc_peer *held[8], *other;
    for (unsigned i = 0; i < 3; i++)
        assert(peers_enter(peers, v4(1), 5, 3, &held[i]) == PEERS_WELCOME && held[i] == held[0]);
    assert(peers_enter(peers, v4(1), 5, 3, &other) == PEERS_TOO_MANY_UNAUTHENTICATED && other == NULL);
    assert(peers_enter(peers, v4(2), 5, 3, &other) == PEERS_WELCOME && other != held[0]);
    held[0]->authenticated = true;
    assert(peers_enter(peers, v4(1), 5, 3, &held[3]) == PEERS_WELCOME);
    assert(peers_enter(peers, v4(1), 5, 3, &held[4]) == PEERS_WELCOME);
    assert(peers_enter(peers, v4(1), 5, 3, &held[5]) == PEERS_TOO_MANY);
    peers_leave(peers, held[0]);
    assert(peers_enter(peers, v4(1), 5, 3, &held[5]) == PEERS_WELCOME && held[5]->connections == 5);
    peers_free(peers);
}

static void an_ipv6_caller_is_its_prefix(void)
{
    asc_peers *peers = peers_new(64, SEED);
    asc_peer *one, *two, *three, *mapped;
    assert(peers_enter(peers, v6(7, 1), 2, 2, &one) == PEERS_WELCOME);
    assert(peers_enter(peers, v6(7, 99), 2, 2, &two) == PEERS_WELCOME && two == one);
    assert(peers_enter(peers, v6(7, 3), 2, 2, &three) == PEERS_TOO_MANY);
    assert(peers_enter(peers, v6(8, 1), 2, 2, &three) == PEERS_WELCOME && three != one);
    /* the prefix of ::1:2 is 0, and so is the address 0.0.0.0 as a number: they are different callers */
    assert(peers_enter(peers, v6(0, 0x00010002), 2, 2, &one) == PEERS_WELCOME);
    assert(peers_enter(peers, v4(0), 2, 2, &mapped) == PEERS_WELCOME && mapped != one);
    peers_free(peers);
}

/* Many addresses that never authenticate neither fill the table nor push out the one that did. */
static void strangers_are_forgotten(void)
{
    asc_peers *peers = peers_new(4, SEED);
    asc_peer *peer;
    assert(peers_enter(peers, v4(1), 9, 1, &peer) == PEERS_WELCOME);
    peer->authenticated = true;
    peers_leave(peers, peer);
    for (uint32_t i = 100; i < 10100; i++) {
        assert(peers_enter(peers, v4(i), 9, 1, &peer) == PEERS_WELCOME && !peer->authenticated);
        peers_leave(peers, peer);
    }
    asc_peer *first, *second;
    assert(peers_enter(peers, v4(1), 9, 1, &first) == PEERS_WELCOME && first->authenticated);
    assert(peers_enter(peers, v4(1), 9, 1, &second) == PEERS_WELCOME && second == first);
    peers_free(peers);
}

/* Those that authenticated make room for each other, the one gone longest first; nobody who is here is forgotten. */
static void the_oldest_makes_room(void)
{
    asc_peers *peers = peers_new(4, SEED);
    asc_peer *peer, *here[4];
    for (uint32_t i = 0; i < 4; i++) {
        assert(peers_enter(peers, v4(i), 9, 9, &peer) == PEERS_WELCOME);
        peer->authenticated = true;
        peers_leave(peers, peer);
    }
    assert(peers_enter(peers, v4(0), 9, 9, &peer) == PEERS_WELCOME); /* now 1 is the oldest */
    peers_leave(peers, peer);
    assert(peers_enter(peers, v4(50), 9, 9, &here[0]) == PEERS_WELCOME);
    assert(peers_enter(peers, v4(0), 9, 9, &here[1]) == PEERS_WELCOME && here[1]->authenticated);
    assert(peers_enter(peers, v4(2), 9, 9, &here[2]) == PEERS_WELCOME && here[2]->authenticated);
    assert(peers_enter(peers, v4(1), 9, 9, &here[3]) == PEERS_WELCOME && !here[3]->authenticated); /* 3 made room */
    assert(peers_enter(peers, v4(3), 9, 9, &peer) == PEERS_NO_ROOM && peer == NULL);
    for (unsigned i = 0; i < 4; i++)
        peers_leave(peers, here[i]);
    peers_free(peers);
}

/* Against a model that is an array. */
static void random_walk(void)
{
    enum { ADDRESSES = 40, MOST = 4, UNKNOWN = 2 };
    asc_peers *peers = peers_new(ADDRESSES * MOST, SEED);
    asc_peer *entries[ADDRESSES] = {0};
    unsigned count[ADDRESSES] = {0};
    bool known[ADDRESSES] = {0};
    uint64_t state = 88172645463325252ull;
    for (unsigned turn = 0; turn < 200000; turn++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        unsigned who = (unsigned)(state >> 33) % ADDRESSES, what = (unsigned)(state >> 20) % 16;
        if (what < 8) {
            asc_peer *peer;
            enum peers_verdict wanted = count[who] >= MOST ? PEERS_TOO_MANY
                                        : !known[who] && count[who] >= UNKNOWN ? PEERS_TOO_MANY_UNAUTHENTICATED
                                                                              : PEERS_WELCOME;
            assert(peers_enter(peers, v4(who), MOST, UNKNOWN, &peer) == wanted);
            if (peer != NULL) {
                entries[who] = peer;
                count[who]++;
                assert(peer->connections == count[who] && peer->authenticated == known[who]);
            }
        } else if (what < 15 && count[who]) {
            peers_leave(peers, entries[who]);
            count[who]--;
        } else if (what == 15 && count[who]) {
            known[who] = entries[who]->authenticated = true;
        }
    }
    peers_free(peers);
}

static void networks(void)
{
    uint8_t net[16];
    memcpy(net, v4(0x0a010000), 16);
    assert(peers_within(v4(0x0a01ffff), net, 96 + 16));
    assert(!peers_within(v4(0x0a020000), net, 96 + 16));
    assert(peers_within(v4(0x0a020000), net, 96 + 14));
    assert(peers_within(v4(0x0a010000), net, 128) && !peers_within(v4(0x0a010001), net, 128));
    assert(!peers_within(v6(0x20010db800000000, 1), net, 96 + 8));
    memcpy(net, v6(0x20010db800000000, 0), 16);
    assert(peers_within(v6(0x20010db8ffffffff, 1), net, 32) && !peers_within(v6(0x20010db900000000, 1), net, 32));
    assert(peers_within(v4(1), net, 0) && !peers_within(v4(1), net, 129));
}

int main(void)
{
    assert(peers_new(0, SEED) == NULL);
    caps();
    an_ipv6_caller_is_its_prefix();
    strangers_are_forgotten();
    the_oldest_makes_room();
    random_walk();
    networks();
    return 0;
}
