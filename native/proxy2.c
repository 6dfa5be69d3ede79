/* The PROXY protocol's header, version 2. See proxy2.h; sections are those of proxy-protocol.txt. */
#include "proxy2.h"

#include <stdbool.h>
#include <string.h>

enum { SIGNATURE = 12, TLV_FIXED = 3, TYPE_CRC32C = 0x03 };
enum { LOCAL = 0, PROXY = 1 };
enum { UNSPEC = 0, INET = 1, INET6 = 2, UNIX = 3, DGRAM = 2 };

static const uint8_t signature[SIGNATURE] = {0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a};
static const uint8_t block_of[] = {[UNSPEC] = 0, [INET] = 12, [INET6] = 36, [UNIX] = 216};

static enum proxy2_result wrong(proxy2_header *header, const char *why)
{
    header->why = why;
    return PROXY2_ERROR;
}

static unsigned u16(const uint8_t *at)
{
    return (unsigned)at[0] << 8 | at[1];
}

/* CRC32c (RFC 4960, appendix B) of the header with the four bytes at `field` taken as zeroes. Bit by bit: at most
 * PROXY2_MAX bytes, and few senders have it. */
static uint32_t checksum(const uint8_t *bytes, size_t len, size_t field)
{
    uint32_t crc = 0xffffffffu;
    for (size_t i = 0; i < len; i++) {
        crc ^= i >= field && i - field < 4 ? 0 : bytes[i];
        for (unsigned bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (0x82f63b78u & (0 - (crc & 1)));
    }
    return ~crc;
}

/* The TLVs at bytes[at..len): NULL, or what is wrong. `*tlvs`: whether that is what they are. */
static const char *read_tlvs(const uint8_t *bytes, size_t at, size_t len, bool *tlvs)
{
    size_t field = 0;
    *tlvs = false;
    while (at < len) {
        if (len - at < TLV_FIXED)
            return "a TLV is cut off";
        size_t size = u16(bytes + at + 1);
        if (size > len - at - TLV_FIXED)
            return "a TLV is longer than the header";
        if (bytes[at] == TYPE_CRC32C) {
            if (size != 4)
                return "its checksum has not 4 bytes";
            if (field != 0)
                return "it has two checksums"; /* each would cover the other: 2.2.3 knows one */
            field = at + TLV_FIXED;
        }
        at += TLV_FIXED + size;
    }
    *tlvs = true;
    if (field == 0)
        return NULL;
    uint32_t said = (uint32_t)u16(bytes + field) << 16 | u16(bytes + field + 2);
    return said == checksum(bytes, len, field) ? NULL : "its checksum is wrong";
}

enum proxy2_result proxy2_parse(proxy2_header *header, const char *text, size_t len)
{
    const uint8_t *bytes = (const uint8_t *)text;
    *header = (proxy2_header){.source = PROXY2_REAL, .why = ""};
    if (len >= 5 && memcmp(bytes, "PROXY", 5) == 0)
        return wrong(header, "it is of version 1");
    if (memcmp(bytes, signature, len < SIGNATURE ? len : SIGNATURE) != 0)
        return wrong(header, "there is none");
    if (len < SIGNATURE + 1)
        return PROXY2_PARTIAL;
    if (bytes[12] >> 4 != 2)
        return wrong(header, "its version is unknown");
    unsigned command = bytes[12] & 15;
    if (command != LOCAL && command != PROXY) /* "receivers must drop connections" (2.2) */
        return wrong(header, "its command is unknown");
    if (len < PROXY2_FIXED)
        return PROXY2_PARTIAL;
    unsigned family = bytes[13] >> 4, transport = bytes[13] & 15;
    if (command == PROXY && (family > UNIX || transport > DGRAM))
        return wrong(header, "its address family or transport is unknown");
    size_t whole = PROXY2_FIXED + u16(bytes + 14);
    if (whole > PROXY2_MAX)
        return wrong(header, "it is longer than 4096 bytes");
    bool given = command == PROXY && family != UNSPEC && transport != UNSPEC;
    size_t tlvs_at = PROXY2_FIXED + (family <= UNIX ? block_of[family] : 0);
    if (given && tlvs_at > whole)
        return wrong(header, "its addresses are cut off");
    if (len < whole)
        return PROXY2_PARTIAL;
    if (tlvs_at <= whole) {
        bool tlvs;
        const char *why = read_tlvs(bytes, tlvs_at, whole, &tlvs);
        if (why != NULL && (given || tlvs))
            return wrong(header, why);
    }
    const uint8_t *addresses = bytes + PROXY2_FIXED; /* source, destination, source's port, destination's port */
    if (given && family == INET) {
        header->source = PROXY2_NETWORK;
        memset(header->address + 10, 0xff, 2);
        memcpy(header->address + 12, addresses, 4);
        header->port = (uint16_t)u16(addresses + 8);
    } else if (given && family == INET6) {
        header->source = PROXY2_NETWORK;
        memcpy(header->address, addresses, 16);
        header->port = (uint16_t)u16(addresses + 32);
    } else if (given) {
        header->source = PROXY2_UNIX;
    }
    header->len = (uint32_t)whole;
    return PROXY2_OK;
}
