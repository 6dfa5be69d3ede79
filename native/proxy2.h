/* The PROXY protocol's header, version 2 (haproxy.org, proxy-protocol.txt, 2.2): who stands behind a load balancer that
 * passes a connection on. Version 1 is told apart and refused: it needs a byte-wise reader and carries nothing more.
 *
 * The header may come in pieces: what is no prefix of one is an error at its first wrong byte, and nothing of the address
 * block is looked at before all of the header is there (2.2). A header that says more than PROXY2_MAX is an error, so that
 * is what a caller has to hold.
 *
 * TLVs are skipped within their bounds, but for the checksum (2.2.3), which is verified. With the command LOCAL, and where
 * family or transport is unspecified, the block is discarded as 2.2 says: nothing in it makes the header an error, unless
 * it is made of TLVs with a checksum that is wrong.
 */
#ifndef ASC_PROXY2_H
#define ASC_PROXY2_H

#include <stddef.h>
#include <stdint.h>

#define PROXY2_FIXED 16u /* signature, version and command, family and transport, length */
#define PROXY2_MAX 4096u /* the whole header; the largest that haproxy sends has 233 bytes without the caller's certificate */

enum proxy2_result { PROXY2_PARTIAL, PROXY2_OK, PROXY2_ERROR };

/* Whose address the header gives. */
enum proxy2_source {
    PROXY2_REAL,    /* none: the connection's own ends count (LOCAL, UNSPEC) */
    PROXY2_NETWORK, /* AF_INET, AF_INET6 */
    PROXY2_UNIX,    /* AF_UNIX: a process beside the load balancer, without an address */
};

typedef struct {
    uint8_t source;      /* enum proxy2_source */
    uint8_t address[16]; /* with PROXY2_NETWORK; IPv4 as ::ffff:a.b.c.d */
    uint16_t port;       /* the same, host order */
    uint32_t len;        /* with PROXY2_OK: bytes of the header; what follows it is the connection's first */
    const char *why;     /* with PROXY2_ERROR: a static clause for logs */
} proxy2_header;

enum proxy2_result proxy2_parse(proxy2_header *header, const char *bytes, size_t len);

#endif
