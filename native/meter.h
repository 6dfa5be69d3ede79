/* The block of cells that counts the exchanges of one (listener, route, provider, operation).
 *
 * Written natively at settle and at each upstream read, so that counting costs no Python call. telemetry/metrics reads
 * the same layout through the constants that the module exports (METER_*).
 */
#ifndef ASC_METER_H
#define ASC_METER_H

#include "page.h"

/* Answers are counted by status: one cell each for these, in this order, and a last one for any other. */
#define METER_STATUSES \
    {200, 204, 400, 401, 403, 404, 405, 408, 409, 413, 414, 415, 422, 424, 429, 431, 499, 500, 501, 502, 503, 504, 529}
#define METER_N_STATUS 24u /* 23 and other */

/* Histograms: METER_N_BUCKETS cumulative-free buckets (the last is +Inf); their sums, in microseconds, stand apart. */
#define METER_N_BUCKETS 16u
/* Upper bounds in microseconds. */
#define METER_BOUNDS_GATEWAY {50, 100, 200, 300, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 250000, 1000000, 5000000}
#define METER_BOUNDS_LATENCY \
    {1000, 2500, 5000, 10000, 25000, 50000, 100000, 250000, 500000, 1000000, 2500000, 5000000, 10000000, 30000000, 120000000}

/* What every request adds to stands in the block's first cache line, and the buckets of a histogram in two of their own:
 * with thousands of routes, each line is one that has to be fetched. */
enum meter_cell {
    METER_TOKENS_IN = 0,
    METER_TOKENS_OUT,
    METER_SUMS, /* one for each histogram */
    METER_STATUS = 7,
    METER_GATEWAY = 32, /* the gateway's own time before the request left */
    METER_FIRST_TOKEN = METER_GATEWAY + METER_N_BUCKETS,
    METER_BETWEEN_TOKENS = METER_FIRST_TOKEN + METER_N_BUCKETS,
    METER_REQUEST = METER_BETWEEN_TOKENS + METER_N_BUCKETS,
    METER_CELLS = METER_REQUEST + METER_N_BUCKETS,
};
_Static_assert(METER_STATUS + METER_N_STATUS <= METER_GATEWAY, "the statuses end before the histograms");

/* The cell of a histogram's sum, from the start of the block. */
static inline uint32_t meter_sum(enum meter_cell histogram)
{
    return METER_SUMS + ((uint32_t)histogram - METER_GATEWAY) / METER_N_BUCKETS;
}

void meter_status(const asc_page *page, uint32_t block, unsigned status);
void meter_gateway(const asc_page *page, uint32_t block, uint64_t ns);
void meter_latency(const asc_page *page, uint32_t block, enum meter_cell histogram, uint64_t ns);

#endif
