#include "limit.h"

#include <string.h>

static const char *const names[LIMIT_COUNT] = {
    "",
#define X(id, name) name,
    LIMIT_NAMES(X)
#undef X
};

const char *limit_name(enum asc_limit limit)
{
    return limit > LIMIT_NONE && limit < LIMIT_COUNT ? names[limit] : "";
}

enum asc_limit limit_named(const char *name, size_t len)
{
    for (int i = LIMIT_NONE + 1; i < LIMIT_COUNT; i++)
        if (strlen(names[i]) == len && memcmp(names[i], name, len) == 0)
            return (enum asc_limit)i;
    return LIMIT_NONE;
}
