/* Memory for plaintext credentials. See secret.h for the contract.
 *
 * The mapping is: guard page, arena, guard page. The first 16 bytes of the arena hold a mark that MADV_WIPEONFORK takes
 * away in a forked child, where every value reads as zeroes and must not be sent as if it were one.
 */
#include "secret.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { ALIGN = 16, MARK_SIZE = 16 };
static const char MARK[MARK_SIZE] = "secrets are here";

/* A value in use; the list is in order of place. */
typedef struct block {
    struct block *next;
    size_t at, len; /* from the start of the arena; len is rounded up to ALIGN */
} block;

struct secret_arena {
    char *mapping;
    size_t mapped;
    char *base;
    size_t size;
    block *blocks;
    bool locked;
};

secret_arena *secret_arena_new(size_t size)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    if (size == 0 || size > SIZE_MAX / 2) {
        errno = EINVAL;
        return NULL;
    }
    secret_arena *arena = calloc(1, sizeof *arena);
    if (arena == NULL) return NULL;
    arena->size = (size + page - 1) / page * page;
    arena->mapped = arena->size + 2 * page;
    arena->mapping = mmap(NULL, arena->mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (arena->mapping == MAP_FAILED) {
        free(arena);
        return NULL;
    }
    arena->base = arena->mapping + page;
    /* No dump and wipe on fork are promises: where the kernel refuses them (before 4.14) there is no arena. */
    if (mprotect(arena->base, arena->size, PROT_READ | PROT_WRITE) != 0 ||
        madvise(arena->base, arena->size, MADV_DONTDUMP) != 0 ||
        madvise(arena->base, arena->size, MADV_WIPEONFORK) != 0) {
        int reason = errno;
        munmap(arena->mapping, arena->mapped);
        free(arena);
        errno = reason;
        return NULL;
    }
    arena->locked = mlock(arena->base, arena->size) == 0;
    memcpy(arena->base, MARK, MARK_SIZE);
    return arena;
}

void secret_arena_free(secret_arena *arena)
{
    if (arena == NULL) return;
    explicit_bzero(arena->base, arena->size);
    munmap(arena->mapping, arena->mapped);
    for (block *next, *b = arena->blocks; b != NULL; b = next) {
        next = b->next;
        free(b);
    }
    free(arena);
}

bool secret_arena_locked(const secret_arena *arena)
{
    return arena->locked;
}

size_t secret_arena_used(const secret_arena *arena)
{
    size_t used = 0;
    for (const block *b = arena->blocks; b != NULL; b = b->next) used += b->len;
    return used;
}

bool secret_arena_alive(const secret_arena *arena)
{
    return memcmp(arena->base, MARK, MARK_SIZE) == 0;
}

static size_t rounded(size_t len)
{
    return (len + ALIGN - 1) / ALIGN * ALIGN;
}

char *secret_alloc(secret_arena *arena, size_t len)
{
    if (len == 0 || len > arena->size) return NULL; /* before rounding, which then cannot overflow */
    size_t need = rounded(len), at = MARK_SIZE;
    block **link = &arena->blocks;
    while (*link != NULL && (*link)->at - at < need) {
        at = (*link)->at + (*link)->len;
        link = &(*link)->next;
    }
    if (*link == NULL && arena->size - at < need) return NULL;
    block *made = malloc(sizeof *made);
    if (made == NULL) return NULL;
    *made = (block){.next = *link, .at = at, .len = need};
    *link = made;
    return arena->base + at; /* zeroed: by the kernel first, by secret_free later */
}

void secret_free(secret_arena *arena, char *bytes)
{
    for (block **link = &arena->blocks; bytes != NULL && *link != NULL; link = &(*link)->next) {
        block *gone = *link;
        if (arena->base + gone->at != bytes) continue;
        explicit_bzero(bytes, gone->len);
        *link = gone->next;
        free(gone);
        return;
    }
}

/* Give the end of a value back, wiped. */
static void shrink(secret_arena *arena, char *bytes, size_t len)
{
    for (block *b = arena->blocks; b != NULL; b = b->next) {
        if (arena->base + b->at != bytes) continue;
        explicit_bzero(bytes + len, b->len - len);
        b->len = rounded(len);
        return;
    }
}

__attribute__((format(printf, 2, 3))) static void wrong(secret_problem *problem, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(problem->sentence, sizeof problem->sentence, format, arguments);
    va_end(arguments);
}

/* Place of the first byte that may not stand in a header value, len when there is none. */
static size_t first_invisible(const char *bytes, size_t len)
{
    size_t i = 0;
    while (i < len && bytes[i] >= 0x21 && bytes[i] <= 0x7e) i++;
    return i;
}

/* Read until the end or until `cap` bytes. -1 with errno. */
static ssize_t read_whole(int fd, char *to, size_t cap)
{
    size_t len = 0;
    while (len < cap) {
        ssize_t n = read(fd, to + len, cap - len);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return -1;
        if (n == 0) break;
        len += (size_t)n;
    }
    return (ssize_t)len;
}

static char *load_open(secret_arena *arena, int fd, const char *path, size_t *len, secret_problem *problem)
{
    struct stat facts;
    if (fstat(fd, &facts) != 0 || !S_ISREG(facts.st_mode)) {
        wrong(problem, "secret %s is not a regular file; name the file that holds the value", path);
        return NULL;
    }
    /* One byte more than expected tells a file that grows, and one more than the longest value with CRLF is too long. */
    enum { CAP_MAX = SECRET_MAX + 3 };
    size_t cap = facts.st_size < CAP_MAX ? (size_t)facts.st_size + 1 : CAP_MAX;
    char *bytes = secret_alloc(arena, cap);
    if (bytes == NULL) {
        wrong(problem, "no room in the secret arena for %s; use fewer or shorter credentials", path);
        return NULL;
    }
    ssize_t got = read_whole(fd, bytes, cap);
    size_t n = got > 0 ? (size_t)got : 0;
    if (got < 0) {
        wrong(problem, "cannot read secret %s: %s", path, strerror(errno));
        goto refuse;
    }
    if (n == cap && cap < CAP_MAX) {
        wrong(problem, "secret %s changed while it was read; load it again", path);
        goto refuse;
    }
    if (n > 0 && bytes[n - 1] == '\n') {
        n--;
        if (n > 0 && bytes[n - 1] == '\r') n--;
    }
    if (n == 0) {
        wrong(problem, "secret %s is empty; write the value into it", path);
        goto refuse;
    }
    if (n > SECRET_MAX) {
        wrong(problem, "secret %s is longer than %d bytes; is it the right file?", path, SECRET_MAX);
        goto refuse;
    }
    size_t bad = first_invisible(bytes, n);
    if (bad < n) {
        wrong(problem,
              "secret %s: byte %zu cannot stand in a header (only visible ASCII can); write the bare value, without "
              "spaces and on one line", path, bad + 1);
        goto refuse;
    }
    shrink(arena, bytes, n);
    *len = n;
    return bytes;
refuse:
    secret_free(arena, bytes);
    return NULL;
}

char *secret_load(secret_arena *arena, const char *path, size_t *len, secret_problem *problem)
{
    /* O_NONBLOCK: a FIFO without a writer must not hang us before fstat tells what it is. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0) {
        wrong(problem, "cannot read secret %s: %s; check the path and that this user may read it", path,
              strerror(errno));
        return NULL;
    }
    char *bytes = load_open(arena, fd, path, len, problem);
    close(fd);
    return bytes;
}

char *secret_put(secret_arena *arena, const char *bytes, size_t len, secret_problem *problem)
{
    size_t bad = first_invisible(bytes, len);
    char *copy = NULL;
    if (len == 0)
        wrong(problem, "the secret is empty");
    else if (len > SECRET_MAX)
        wrong(problem, "the secret is longer than %d bytes", SECRET_MAX);
    else if (bad < len)
        wrong(problem, "the secret's byte %zu cannot stand in a header: only visible ASCII can", bad + 1);
    else if ((copy = secret_alloc(arena, len)) == NULL)
        wrong(problem, "no room in the secret arena; use fewer or shorter credentials");
    else
        memcpy(copy, bytes, len);
    return copy;
}
