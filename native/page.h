/* A slot's metric page: counters that survive their worker, in a file of the run directory (DESIGN 2, D6).
 *
 * Layout 1: a header of 64 well-known cells, a directory of series (append-only, written by the slot's worker alone), and the cells
 * of these series. A cell is a 64-bit integer that is added to, stored and loaded with relaxed atomics; readers in other
 * processes see each cell whole, and sums over slots are made on read. A series is found by its key, bytes chosen by
 * telemetry/metrics; cells are never addressed by position in a configuration.
 *
 * One writer: the worker that owns the slot (the supervisor writes the cells marked S, and zeroes gauges at reap).
 */
#ifndef ASC_PAGE_H
#define ASC_PAGE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE_MAGIC 0x3147504353410001ull
#define PAGE_LAYOUT 1u

enum page_cell {
    PAGE_CELL_MAGIC = 0,
    PAGE_CELL_LAYOUT,
    PAGE_CELL_DIRECTORY_USED, /* bytes of the directory in use, published with release */
    PAGE_CELL_CELLS_USED,     /* cells in use, header included */
    PAGE_CELL_SERIES_LOST,    /* series that found no room */
    PAGE_CELL_SLOT,           /* S */
    PAGE_CELL_INCARNATION,    /* S */
    PAGE_CELL_PID,            /* S */
    PAGE_CELL_STATE,          /* S: enum of ascproxy/supervisor/slots.py */
    PAGE_CELL_RESTARTS,       /* S */
    PAGE_CELL_HEARTBEAT_NS,   /* monotonic time of the worker's last tick */
    PAGE_CELL_REVISION,       /* first 12 hex digits of the revision in force, as a number */
    PAGE_CELL_REVISION_FAILED,/* 1 while the newest revision could not be applied */
    PAGE_CELL_IN_FLIGHT,      /* gauge: exchanges between on_request and settle */
    PAGE_CELL_CONNECTIONS,    /* gauge: downstream connections */
    PAGE_CELL_ACCEPTED,       /* counter */
    PAGE_CELL_UPSTREAM_BUSY,  /* gauge */
    PAGE_CELL_UPSTREAM_IDLE,  /* gauge */
    PAGE_CELL_UPSTREAM_OPENED,/* counter */
    PAGE_CELL_BODY_BYTES,     /* gauge: request bodies held */
    PAGE_CELL_LOG_DROPPED,    /* counter: access lines that found no room */
    PAGE_CELL_PAUSED,         /* gauge: downstream connections that do not drain */
    PAGE_CELL_TLS_FAILED,     /* counter: handshakes that failed */
    PAGE_CELL_LISTENING,      /* gauge: 1 when accepting */
    PAGE_CELL_MEMORY,         /* gauge: anonymous memory of the worker, bytes */
    PAGE_CELLS_HEADER = 64,
};

typedef struct {
    uint8_t *base;
    size_t size;       /* bytes mapped */
    size_t directory;  /* bytes of the directory area */
    size_t n_cells;    /* capacity, header included */
} asc_page;

/* Prepare zeroed memory of `size` bytes (at least 64 KiB) as a page; a page that already carries magic and layout is attached as it is.
 * False: too small, misaligned, or another layout. */
bool page_open(asc_page *page, void *base, size_t size);

/* First cell of the series with that key, appended with n_cells zero cells if it is new. 0 when there is no room, or
 * when the key exists with another number of cells; that is counted in SERIES_LOST and cell 0 must not be written. */
uint32_t page_series(asc_page *page, const char *key, size_t key_len, uint32_t n_cells);

/* Iterate over series: *at starts at 0; false at the end or at the first damaged entry. */
bool page_next(const asc_page *page, size_t *at, const char **key, size_t *key_len, uint32_t *first, uint32_t *n_cells);

static inline _Atomic uint64_t *page_at(const asc_page *page, uint32_t cell)
{
    return (_Atomic uint64_t *)(void *)page->base + cell;
}

/* Out-of-range cells, and cell 0, are ignored: a full page must never stop a request. */
static inline void page_add(const asc_page *page, uint32_t cell, uint64_t n)
{
    if (cell != 0 && cell < page->n_cells) {
        _Atomic uint64_t *at = page_at(page, cell); /* one writer: load and store, no locked instruction */
        atomic_store_explicit(at, atomic_load_explicit(at, memory_order_relaxed) + n, memory_order_relaxed);
    }
}

static inline void page_store(const asc_page *page, uint32_t cell, uint64_t value)
{
    if (cell != 0 && cell < page->n_cells)
        atomic_store_explicit(page_at(page, cell), value, memory_order_relaxed);
}

static inline uint64_t page_load(const asc_page *page, uint32_t cell)
{
    return cell < page->n_cells ? atomic_load_explicit(page_at(page, cell), memory_order_relaxed) : 0;
}

#endif
