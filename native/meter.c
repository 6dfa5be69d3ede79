#include "meter.h"

void meter_status(const asc_page *page, uint32_t block, unsigned status)
{
    static const uint16_t known[] = METER_STATUSES;
    unsigned at = 0;
    while (at < METER_N_STATUS - 1 && known[at] != status)
        at++;
    if (block)
        page_add(page, block + METER_STATUS + at, 1);
}

static void observe(const asc_page *page, uint32_t block, enum meter_cell histogram, const uint32_t *bounds, uint64_t ns)
{
    uint64_t us = ns / 1000;
    unsigned at = 0;
    while (at < METER_N_BUCKETS - 1 && us > bounds[at])
        at++;
    page_add(page, block + (uint32_t)histogram + at, 1);
    page_add(page, block + meter_sum(histogram), us);
}

void meter_gateway(const asc_page *page, uint32_t block, uint64_t ns)
{
    static const uint32_t bounds[] = METER_BOUNDS_GATEWAY;
    if (block)
        observe(page, block, METER_GATEWAY, bounds, ns);
}

void meter_latency(const asc_page *page, uint32_t block, enum meter_cell histogram, uint64_t ns)
{
    static const uint32_t bounds[] = METER_BOUNDS_LATENCY;
    if (block)
        observe(page, block, histogram, bounds, ns);
}
