/* Sets of header names: exact names, and patterns with one '*' (x-ratelimit-*, x-*-time). Matching ignores case. */
#ifndef ASC_NAMES_H
#define ASC_NAMES_H

#include <stdbool.h>
#include <stddef.h>

typedef struct asc_names asc_names;

asc_names *names_new(void); /* NULL: no memory */
void names_free(asc_names *set);
/* Add a lower-case name or pattern. False: empty, longer than 128 bytes, a byte that is no lower-case token, two '*',
 * more than 256 members, or no memory. */
bool names_add(asc_names *set, const char *name, size_t len);
bool names_has(const asc_names *set, const char *name, size_t len);

#endif
