/* units: secret.c */
#include "../secret.h"

#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#if defined(__has_feature) /* clang's way to say what gcc defines */
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif

static int failures;

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            failures++;                                                             \
        }                                                                           \
    } while (0)

static bool zeroes(const char *bytes, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if (bytes[i] != 0) return false;
    return true;
}

static void first_fit(void)
{
    secret_arena *arena = secret_arena_new(4096);
    char *a = secret_alloc(arena, 10), *b = secret_alloc(arena, 32), *c = secret_alloc(arena, 1);
    CHECK((uintptr_t)a % 16 == 0 && b == a + 16 && c == b + 32);
    CHECK(secret_arena_used(arena) == 64);
    memset(b, 'x', 32);
    secret_free(arena, b);
    CHECK(zeroes(b, 32)); /* wiped before anything else takes the place */
    CHECK(secret_alloc(arena, 33) == c + 16);
    char *again = secret_alloc(arena, 16);
    CHECK(again == b && zeroes(again, 16));
    CHECK(secret_alloc(arena, 16) == b + 16);
    secret_free(arena, NULL);
    secret_free(arena, a + 1); /* not the start of a value: nothing happens */
    CHECK(secret_arena_used(arena) == 16 + 32 + 16 + 48);
    secret_arena_free(arena);
}

static void bounds(void)
{
    secret_arena *arena = secret_arena_new(1); /* a page */
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    CHECK(secret_alloc(arena, 0) == NULL);
    CHECK(secret_alloc(arena, SIZE_MAX) == NULL);
    CHECK(secret_alloc(arena, SIZE_MAX - 8) == NULL);
    CHECK(secret_alloc(arena, page) == NULL); /* the mark takes 16 bytes */
    char *all = secret_alloc(arena, page - 16);
    CHECK(all != NULL && secret_alloc(arena, 1) == NULL);
    secret_free(arena, all);
    CHECK(secret_alloc(arena, page - 16) == all);
    secret_arena_free(arena);
    CHECK(secret_arena_new(0) == NULL && secret_arena_new(SIZE_MAX) == NULL);
}

/* How a child ends that runs `act` on the arena. */
static int in_child(secret_arena *arena, char *value, int (*act)(secret_arena *, char *))
{
    pid_t child = fork();
    if (child == 0) {
        signal(SIGSEGV, SIG_DFL); /* not the sanitizer's */
        _exit(act(arena, value));
    }
    int status = 0;
    waitpid(child, &status, 0);
    return status;
}

static int reads_nothing(secret_arena *arena, char *value)
{
    return !secret_arena_alive(arena) && zeroes(value, 6) ? 0 : 1;
}

static int writes_after(secret_arena *arena, char *value)
{
    (void)arena;
    volatile char *end = value - 16 + sysconf(_SC_PAGESIZE);
    *end = 1;
    return 0;
}

static int writes_before(secret_arena *arena, char *value)
{
    (void)arena;
    volatile char *before = value - 17;
    *before = 1;
    return 0;
}

static void forked_and_guarded(void)
{
    secret_arena *arena = secret_arena_new(1);
    secret_problem problem;
    char *value = secret_put(arena, "sk-123", 6, &problem);
    CHECK(secret_arena_alive(arena));
    int status = in_child(arena, value, reads_nothing);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    status = in_child(arena, value, writes_after);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
    status = in_child(arena, value, writes_before);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
    CHECK(memcmp(value, "sk-123", 6) == 0);
    secret_arena_free(arena);
}

/* Whether the kernel agrees: "dd" do not dump, "wf" wipe on fork, "lo" locked. */
static void flags(void)
{
    secret_arena *arena = secret_arena_new(65536);
    char *value = secret_alloc(arena, 1);
    char line[512], wanted[32];
    snprintf(wanted, sizeof wanted, "%lx-", (unsigned long)(uintptr_t)(value - 16));
    FILE *maps = fopen("/proc/self/smaps", "r");
    bool here = false, seen = false;
    while (fgets(line, sizeof line, maps) != NULL) {
        if (strncmp(line, wanted, strlen(wanted)) == 0) here = true;
        if (!here || strncmp(line, "VmFlags:", 8) != 0) continue;
        CHECK(strstr(line, " dd") != NULL && strstr(line, " wf") != NULL);
#ifndef __SANITIZE_ADDRESS__ /* which makes mlock do nothing; tests/unit/native/test_secret.py looks at it without */
        CHECK((strstr(line, " lo") != NULL) == secret_arena_locked(arena));
#endif
        seen = true;
        break;
    }
    CHECK(seen);
    fclose(maps);
    secret_arena_free(arena);
}

static char folder[] = "/tmp/ascproxy-secret-XXXXXX", path[64];

static void file(const char *bytes, size_t len)
{
    FILE *f = fopen(path, "w");
    fwrite(bytes, 1, len, f);
    fclose(f);
}

static void loads(secret_arena *arena, const char *bytes, size_t size, const char *want)
{
    secret_problem problem = {""};
    size_t len = 0;
    file(bytes, size);
    char *value = secret_load(arena, path, &len, &problem);
    CHECK(value != NULL && len == strlen(want) && memcmp(value, want, len) == 0);
    secret_free(arena, value);
}

static void refuses(secret_arena *arena, const char *bytes, size_t size, const char *because)
{
    secret_problem problem = {""};
    size_t len = 0;
    file(bytes, size);
    CHECK(secret_load(arena, path, &len, &problem) == NULL);
    CHECK(strstr(problem.sentence, because) != NULL && strstr(problem.sentence, path) != NULL);
    CHECK(secret_arena_used(arena) == 0);
}

static void files(void)
{
    secret_arena *arena = secret_arena_new(65536);
    static char longest[SECRET_MAX + 4], want[SECRET_MAX + 1];
    memset(longest, 'k', sizeof longest);
    memset(want, 'k', SECRET_MAX);
    loads(arena, "sk-1", 4, "sk-1");
    loads(arena, "sk-1\n", 5, "sk-1");
    loads(arena, "sk-1\r\n", 6, "sk-1");
    loads(arena, "!~", 2, "!~");
    loads(arena, longest, SECRET_MAX, want);
    refuses(arena, longest, SECRET_MAX + 1, "is longer than 16384 bytes");
    refuses(arena, longest, SECRET_MAX + 4, "is longer than 16384 bytes");
    memcpy(longest + SECRET_MAX, "\r\n", 2);
    loads(arena, longest, SECRET_MAX + 2, want);
    refuses(arena, "", 0, "is empty");
    refuses(arena, "\n", 1, "is empty");
    refuses(arena, "\r\n", 2, "is empty");
    refuses(arena, "sk-1\n\n", 6, "byte 5 cannot stand in a header");
    refuses(arena, "sk-1\r", 5, "byte 5 cannot stand in a header");
    refuses(arena, "a b", 3, "byte 2 cannot stand in a header");
    refuses(arena, "a\0b", 3, "byte 2 cannot stand in a header");
    refuses(arena, "\xef\xbb\xbfsk", 5, "byte 1 cannot stand in a header"); /* a byte order mark */
    refuses(arena, "\x7f", 1, "byte 1 cannot stand in a header");

    secret_problem problem = {""};
    size_t len;
    CHECK(secret_load(arena, folder, &len, &problem) == NULL && strstr(problem.sentence, "not a regular file"));
    unlink(path);
    CHECK(secret_load(arena, path, &len, &problem) == NULL && strstr(problem.sentence, "No such file or directory"));
    CHECK(mkfifo(path, 0600) == 0);
    CHECK(secret_load(arena, path, &len, &problem) == NULL && strstr(problem.sentence, "not a regular file"));
    unlink(path);
    secret_arena_free(arena);
}

static void puts_and_room(void)
{
    secret_arena *arena = secret_arena_new(1);
    secret_problem problem = {""};
    static char big[SECRET_MAX + 1];
    memset(big, 'k', sizeof big);
    CHECK(secret_put(arena, "", 0, &problem) == NULL && strstr(problem.sentence, "is empty"));
    CHECK(secret_put(arena, big, sizeof big, &problem) == NULL && strstr(problem.sentence, "is longer"));
    CHECK(secret_put(arena, "sk\n", 3, &problem) == NULL && strstr(problem.sentence, "byte 3"));
    CHECK(secret_put(arena, big, SECRET_MAX, &problem) == NULL && strstr(problem.sentence, "no room"));
    CHECK(secret_arena_used(arena) == 0);
    file(big, 5000);
    size_t len;
    CHECK(secret_load(arena, path, &len, &problem) == NULL && strstr(problem.sentence, "no room"));
    secret_arena_free(arena);
}

int main(void)
{
    if (mkdtemp(folder) == NULL) return 2;
    snprintf(path, sizeof path, "%s/secret", folder);
    first_fit();
    bounds();
    forked_and_guarded();
    flags();
    files();
    puts_and_room();
    unlink(path);
    rmdir(folder);
    if (failures > 0) fprintf(stderr, "%d checks failed\n", failures);
    return failures > 0;
}
