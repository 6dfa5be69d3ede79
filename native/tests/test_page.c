/* units: page.c */
#include "../page.h"

#undef NDEBUG
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SIZE 65536u

static uint8_t *zeroed(size_t size)
{
    uint8_t *base = aligned_alloc(8, size);
    assert(base != NULL);
    memset(base, 0, size);
    return base;
}

static void opens_only_what_is_a_page(void)
{
    asc_page page;
    uint8_t *base = zeroed(SIZE + 8);
    assert(!page_open(&page, NULL, SIZE));
    assert(!page_open(&page, base, SIZE - 1));
    assert(!page_open(&page, base + 1, SIZE));
    assert(page_open(&page, base, SIZE));
    assert(page_load(&page, PAGE_CELL_MAGIC) == PAGE_MAGIC);
    assert(page_load(&page, PAGE_CELL_CELLS_USED) == PAGE_CELLS_HEADER);
    assert(page.n_cells * 8 + page.directory == SIZE);
    assert(page_open(&page, base, SIZE));

    page_store(&page, PAGE_CELL_LAYOUT, PAGE_LAYOUT + 1);
    assert(!page_open(&page, base, SIZE));
    page_store(&page, PAGE_CELL_LAYOUT, PAGE_LAYOUT);
    page_store(&page, PAGE_CELL_CELLS_USED, page.n_cells + 1);
    assert(!page_open(&page, base, SIZE));
    page_store(&page, PAGE_CELL_CELLS_USED, PAGE_CELLS_HEADER - 1);
    assert(!page_open(&page, base, SIZE));
    page_store(&page, PAGE_CELL_CELLS_USED, PAGE_CELLS_HEADER);
    page_store(&page, PAGE_CELL_DIRECTORY_USED, page.directory + 1);
    assert(!page_open(&page, base, SIZE));
    memset(base, 'x', 8);
    assert(!page_open(&page, base, SIZE));
    free(base);
}

static void finds_a_series_again_after_reopening(void)
{
    asc_page page;
    uint8_t *base = zeroed(SIZE);
    assert(page_open(&page, base, SIZE));
    uint32_t a = page_series(&page, "a", 1, 3);
    uint32_t b = page_series(&page, "bb\0c", 4, 1);
    assert(a == PAGE_CELLS_HEADER && b == a + 3);
    page_add(&page, a + 2, 7);
    page_add(&page, a + 2, UINT64_MAX); /* minus one */

    asc_page other;
    assert(page_open(&other, base, SIZE));
    assert(page_series(&other, "bb\0c", 4, 1) == b);
    assert(page_series(&other, "a", 1, 3) == a);
    assert(page_load(&other, a + 2) == 6);
    assert(page_series(&other, "bb", 2, 1) == b + 1);

    size_t at = 0, key_len;
    const char *key;
    uint32_t first, cells;
    assert(page_next(&other, &at, &key, &key_len, &first, &cells) && key_len == 1 && *key == 'a' && first == a && cells == 3);
    assert(page_next(&other, &at, &key, &key_len, &first, &cells) && key_len == 4 && memcmp(key, "bb\0c", 4) == 0);
    assert(page_next(&other, &at, &key, &key_len, &first, &cells) && key_len == 2);
    assert(!page_next(&other, &at, &key, &key_len, &first, &cells));
    free(base);
}

static void counts_what_finds_no_room(void)
{
    asc_page page;
    uint8_t *base = zeroed(SIZE);
    assert(page_open(&page, base, SIZE));
    assert(page_series(&page, "k", 1, 2) != 0);
    assert(page_series(&page, "k", 1, 3) == 0);
    assert(page_series(&page, "", 0, 1) == 0);
    assert(page_series(&page, "none", 4, 0) == 0);
    assert(page_series(&page, "huge", 4, UINT32_MAX) == 0);
    assert(page_load(&page, PAGE_CELL_SERIES_LOST) == 4);
    uint32_t rest = (uint32_t)(page.n_cells - page_load(&page, PAGE_CELL_CELLS_USED));
    assert(page_series(&page, "rest+1", 6, rest + 1) == 0);
    uint32_t last = page_series(&page, "rest", 4, rest);
    assert(last != 0 && last + rest == page.n_cells);
    assert(page_series(&page, "more", 4, 1) == 0);
    page_store(&page, last + rest - 1, 5);
    assert(page_load(&page, last + rest - 1) == 5);
    free(base);

    base = zeroed(SIZE);
    assert(page_open(&page, base, SIZE));
    char key[16];
    unsigned n = 0;
    while (page_series(&page, key, (size_t)snprintf(key, sizeof key, "key-%u", n), 1) != 0)
        n++;
    assert(n == page.directory / 24);
    assert(page_load(&page, PAGE_CELL_SERIES_LOST) == 1);
    assert(page_series(&page, "key-0", 5, 1) == PAGE_CELLS_HEADER);
    free(base);
}

static void ignores_cells_out_of_range(void)
{
    asc_page page;
    uint8_t *base = zeroed(SIZE);
    assert(page_open(&page, base, SIZE));
    page_add(&page, 0, 1);
    page_store(&page, 0, 1);
    page_add(&page, (uint32_t)page.n_cells, 1);
    page_store(&page, UINT32_MAX, 1);
    assert(page_load(&page, 0) == PAGE_MAGIC);
    assert(page_load(&page, (uint32_t)page.n_cells) == 0 && page_load(&page, UINT32_MAX) == 0);
    assert(page_load(&page, PAGE_CELL_DIRECTORY_USED) == 0);
    free(base);
}

/* Whatever another process scribbles over the directory, a reader stays inside and stops, and a writer appends nothing
 * behind the damage. */
static void stops_at_a_damaged_entry(void)
{
    for (size_t byte = 0; byte < 48; byte++) {
        asc_page page;
        uint8_t *base = zeroed(SIZE);
        assert(page_open(&page, base, SIZE));
        assert(page_series(&page, "one", 3, 1) != 0);
        assert(page_series(&page, "two", 3, 1) != 0);
        uint8_t *directory = base + page.n_cells * 8;
        directory[byte] ^= 0xff;

        size_t at = 0, key_len;
        const char *key;
        uint32_t first, cells;
        unsigned n = 0;
        while (page_next(&page, &at, &key, &key_len, &first, &cells)) {
            assert(first >= PAGE_CELLS_HEADER && first + cells <= page.n_cells);
            n++;
        }
        bool in_head = byte % 24 < 16;
        assert(n == (in_head ? byte / 24 : 2u));
        assert((page_series(&page, "three", 5, 1) == 0) == in_head);
        free(base);
    }
}

static void survives_a_kill_within_an_append(void)
{
    asc_page page;
    uint8_t *base = zeroed(SIZE);
    assert(page_open(&page, base, SIZE));
    uint32_t a = page_series(&page, "a", 1, 4);
    uint64_t used = page_load(&page, PAGE_CELL_DIRECTORY_USED);
    uint32_t lost = page_series(&page, "lost", 4, 4);
    page_store(&page, PAGE_CELL_DIRECTORY_USED, used); /* as if killed before the entry was published */

    asc_page next;
    assert(page_open(&next, base, SIZE));
    uint32_t b = page_series(&next, "b", 1, 4);
    assert(b == lost + 4 && page_series(&next, "a", 1, 4) == a);
    assert(page_series(&next, "lost", 4, 4) == b + 4);
    free(base);
}

int main(void)
{
    opens_only_what_is_a_page();
    finds_a_series_again_after_reopening();
    counts_what_finds_no_room();
    ignores_cells_out_of_range();
    stops_at_a_damaged_entry();
    survives_a_kill_within_an_append();
    puts("page: ok");
    return 0;
}
