/* A slot's metric page (page.h).
 *
 * The cells come first, from the base of the mapping; the directory of series takes the last quarter of it. Both grow
 * upwards and are sparse until used. An entry of the directory is a head and the key, padded to 8 bytes:
 *
 *     uint32 first cell | uint32 cells | uint32 bytes of the key | uint32 ~(first ^ cells ^ bytes) | key | zeros
 *
 * Order of an append, so that a worker killed at any point leaves a page that its successor can go on with: the entry's
 * bytes, CELLS_USED, and last DIRECTORY_USED (release). A kill in between loses the cells of one series, which are zero,
 * and never hands the same cells to two series.
 */
#include "page.h"

#include <string.h>

#define PAGE_MIN_SIZE 65536u

typedef struct {
    uint32_t first;
    uint32_t n_cells;
    uint32_t key_len;
    uint32_t check; /* a reader must not follow what another process scribbled */
} page_entry;

static uint32_t entry_check(uint32_t first, uint32_t n_cells, uint32_t key_len)
{
    return ~(first ^ n_cells ^ key_len);
}

static size_t entry_size(size_t key_len)
{
    return sizeof(page_entry) + ((key_len + 7u) & ~(size_t)7u);
}

static uint8_t *directory_at(const asc_page *page, size_t offset)
{
    return page->base + page->n_cells * sizeof(uint64_t) + offset;
}

static size_t directory_used(const asc_page *page)
{
    uint64_t used = atomic_load_explicit(page_at(page, PAGE_CELL_DIRECTORY_USED), memory_order_acquire);
    return used <= page->directory ? (size_t)used : 0;
}

bool page_open(asc_page *page, void *base, size_t size)
{
    if (base == NULL || (uintptr_t)base % sizeof(uint64_t) != 0 || size < PAGE_MIN_SIZE)
        return false;
    size &= ~(size_t)(4 * sizeof(uint64_t) - 1); /* a quarter is a whole number of cells */
    if ((size - size / 4) / sizeof(uint64_t) > UINT32_MAX)
        return false;
    page->base = base;
    page->size = size;
    page->directory = size / 4;
    page->n_cells = (size - page->directory) / sizeof(uint64_t);

    uint64_t magic = atomic_load_explicit(page_at(page, PAGE_CELL_MAGIC), memory_order_acquire);
    if (magic == 0) {
        page_store(page, PAGE_CELL_LAYOUT, PAGE_LAYOUT);
        page_store(page, PAGE_CELL_CELLS_USED, PAGE_CELLS_HEADER);
        atomic_store_explicit(page_at(page, PAGE_CELL_MAGIC), PAGE_MAGIC, memory_order_release);
        return true;
    }
    uint64_t cells = page_load(page, PAGE_CELL_CELLS_USED);
    return magic == PAGE_MAGIC && page_load(page, PAGE_CELL_LAYOUT) == PAGE_LAYOUT && cells >= PAGE_CELLS_HEADER &&
           cells <= page->n_cells && page_load(page, PAGE_CELL_DIRECTORY_USED) <= page->directory;
}

bool page_next(const asc_page *page, size_t *at, const char **key, size_t *key_len, uint32_t *first, uint32_t *n_cells)
{
    size_t used = directory_used(page);
    page_entry entry;
    if (*at > used || used - *at < sizeof entry)
        return false;
    memcpy(&entry, directory_at(page, *at), sizeof entry);
    if (entry.check != entry_check(entry.first, entry.n_cells, entry.key_len) || entry.key_len == 0 ||
        entry.key_len > page->directory || entry_size(entry.key_len) > used - *at)
        return false;
    if (entry.first < PAGE_CELLS_HEADER || entry.n_cells == 0 || entry.first > page->n_cells ||
        entry.n_cells > page->n_cells - entry.first)
        return false;
    *key = (const char *)directory_at(page, *at + sizeof entry);
    *key_len = entry.key_len;
    *first = entry.first;
    *n_cells = entry.n_cells;
    *at += entry_size(entry.key_len);
    return true;
}

static uint32_t series_lost(const asc_page *page)
{
    page_add(page, PAGE_CELL_SERIES_LOST, 1);
    return 0;
}

uint32_t page_series(asc_page *page, const char *key, size_t key_len, uint32_t n_cells)
{
    size_t at = 0, found_len;
    const char *found;
    uint32_t first, found_cells;
    while (page_next(page, &at, &found, &found_len, &first, &found_cells)) {
        if (found_len == key_len && memcmp(found, key, key_len) == 0)
            return found_cells == n_cells ? first : series_lost(page);
    }
    /* `at` is the end, unless an entry is damaged: nothing may be appended behind what no reader can pass. */
    uint64_t cells = page_load(page, PAGE_CELL_CELLS_USED);
    if (n_cells % 8 == 0)
        cells = (cells + 7) & ~7ull; /* whole cache lines */
    if (at != directory_used(page) || key_len == 0 || key_len > page->directory || n_cells == 0 ||
        entry_size(key_len) > page->directory - at || cells < PAGE_CELLS_HEADER || cells > page->n_cells ||
        n_cells > page->n_cells - cells)
        return series_lost(page);

    page_entry entry = {(uint32_t)cells, n_cells, (uint32_t)key_len, 0};
    entry.check = entry_check(entry.first, entry.n_cells, entry.key_len);
    memset(directory_at(page, at), 0, entry_size(key_len));
    memcpy(directory_at(page, at), &entry, sizeof entry);
    memcpy(directory_at(page, at + sizeof entry), key, key_len);
    page_store(page, PAGE_CELL_CELLS_USED, cells + n_cells);
    atomic_store_explicit(page_at(page, PAGE_CELL_DIRECTORY_USED), at + entry_size(key_len), memory_order_release);
    return (uint32_t)cells;
}
