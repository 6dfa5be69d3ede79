/* Connections by address. See peers.h. */
#include "peers.h"

#include <stdlib.h>
#include <string.h>

struct asc_peers {
    asc_peer *entries;
    uint32_t *buckets; /* index + 1 of the first entry, 0 none */
    uint64_t seed[2];
    uint32_t capacity, mask;
    uint32_t fresh;            /* entries[fresh..capacity) were never used: their memory was never touched */
    uint32_t free;             /* index + 1 of the first entry that was used and is free */
    uint32_t oldest, newest;   /* index + 1: authenticated, without a connection */
};

asc_peers *peers_new(uint32_t capacity, const uint64_t seed[2])
{
    if (capacity == 0 || capacity > UINT32_MAX / 4)
        return NULL;
    uint32_t n = 1;
    while (n < capacity)
        n *= 2;
    asc_peers *peers = calloc(1, sizeof *peers);
    if (peers == NULL)
        return NULL;
    peers->entries = calloc(capacity, sizeof *peers->entries);
    peers->buckets = calloc(n, sizeof *peers->buckets);
    peers->capacity = capacity;
    peers->mask = n - 1;
    memcpy(peers->seed, seed, sizeof peers->seed);
    if (peers->entries == NULL || peers->buckets == NULL) {
        peers_free(peers);
        return NULL;
    }
    return peers;
}

void peers_free(asc_peers *peers)
{
    if (peers == NULL)
        return;
    free(peers->entries);
    free(peers->buckets);
    free(peers);
}

/* Two rounds of multiply and fold (as in wyhash), keyed on both sides. */
static uint64_t fold(uint64_t a, uint64_t b)
{
    __extension__ typedef unsigned __int128 wide;
    wide product = (wide)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint32_t *bucket_of(asc_peers *peers, uint64_t prefix, bool v4)
{
    uint64_t hash = fold(prefix ^ peers->seed[0], (peers->seed[1] ^ v4) | 1);
    hash = fold(hash ^ peers->seed[1], peers->seed[0] | 1);
    return &peers->buckets[hash & peers->mask];
}

static uint32_t number_of(const asc_peers *peers, const asc_peer *peer)
{
    return (uint32_t)(peer - peers->entries) + 1;
}

static asc_peer *entry(asc_peers *peers, uint32_t number)
{
    return &peers->entries[number - 1];
}

static void unlink_bucket(asc_peers *peers, asc_peer *peer)
{
    uint32_t *at = bucket_of(peers, peer->prefix, peer->v4), number = number_of(peers, peer);
    while (*at != number)
        at = &entry(peers, *at)->next;
    *at = peer->next;
}

static void unlink_age(asc_peers *peers, asc_peer *peer)
{
    *(peer->older ? &entry(peers, peer->older)->newer : &peers->oldest) = peer->newer;
    *(peer->newer ? &entry(peers, peer->newer)->older : &peers->newest) = peer->older;
    peer->older = peer->newer = 0;
}

static asc_peer *take(asc_peers *peers)
{
    if (peers->free) {
        asc_peer *peer = entry(peers, peers->free);
        peers->free = peer->next;
        return peer;
    }
    if (peers->fresh < peers->capacity)
        return &peers->entries[peers->fresh++];
    if (peers->oldest == 0)
        return NULL;
    asc_peer *peer = entry(peers, peers->oldest);
    unlink_age(peers, peer);
    unlink_bucket(peers, peer);
    return peer;
}

enum peers_verdict peers_enter(asc_peers *peers, const uint8_t address[16], uint64_t most, uint64_t most_unauthenticated,
                               asc_peer **found)
{
    static const uint8_t mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
    bool v4 = memcmp(address, mapped, sizeof mapped) == 0;
    uint64_t prefix = 0;
    if (v4)
        memcpy(&prefix, address + 12, 4);
    else
        memcpy(&prefix, address, 8);
    uint32_t *bucket = bucket_of(peers, prefix, v4);
    asc_peer *peer = NULL;
    *found = NULL;
    for (uint32_t at = *bucket; at && peer == NULL; at = entry(peers, at)->next)
        if (entry(peers, at)->prefix == prefix && entry(peers, at)->v4 == v4)
            peer = entry(peers, at);
    uint64_t connections = peer ? peer->connections : 0;
    if (connections >= most)
        return PEERS_TOO_MANY;
    if (!(peer && peer->authenticated) && connections >= most_unauthenticated)
        return PEERS_TOO_MANY_UNAUTHENTICATED;
    if (peer == NULL) {
        peer = take(peers);
        if (peer == NULL)
            return PEERS_NO_ROOM;
        *peer = (asc_peer){.prefix = prefix, .v4 = v4, .next = *bucket};
        *bucket = number_of(peers, peer);
    } else if (peer->connections == 0) {
        unlink_age(peers, peer);
    }
    peer->connections++;
    *found = peer;
    return PEERS_WELCOME;
}

void peers_leave(asc_peers *peers, asc_peer *peer)
{
    if (--peer->connections)
        return;
    if (peer->authenticated) {
        peer->older = peers->newest;
        peer->newer = 0;
        *(peers->newest ? &entry(peers, peers->newest)->newer : &peers->oldest) = number_of(peers, peer);
        peers->newest = number_of(peers, peer);
        return;
    }
    unlink_bucket(peers, peer);
    peer->next = peers->free;
    peers->free = number_of(peers, peer);
}

bool peers_within(const uint8_t address[16], const uint8_t network[16], unsigned bits)
{
    unsigned whole = bits / 8, rest = bits % 8;
    if (bits > 128 || memcmp(address, network, whole) != 0)
        return false;
    return rest == 0 || ((address[whole] ^ network[whole]) >> (8 - rest)) == 0;
}
