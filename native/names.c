#include "names.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SLOTS 512u /* twice the most members: probes stay short */
#define MEMBERS 256u
#define LONGEST 128u

typedef struct {
    char *name;
    uint16_t prefix, suffix; /* bytes before and after '*'; an exact name is all prefix */
    bool pattern;
} member;

struct asc_names {
    member members[MEMBERS];
    uint16_t n, n_patterns;
    uint16_t patterns[MEMBERS];
    uint16_t slots[SLOTS]; /* 1 + index of an exact name, 0 empty */
};

static inline unsigned char lower(unsigned char c)
{
    return (c >= 'A' && c <= 'Z') ? (unsigned char)(c | 0x20) : c;
}

static uint32_t hash_of(const char *name, size_t len)
{
    uint32_t h = 2166136261u; /* FNV-1a: names come from configuration, not from an attacker */
    for (size_t i = 0; i < len; i++)
        h = (h ^ lower((unsigned char)name[i])) * 16777619u;
    return h;
}

static bool same(const char *name, const char *lower_name, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if (lower((unsigned char)name[i]) != (unsigned char)lower_name[i])
            return false;
    return true;
}

static bool token(unsigned char c)
{
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || (c != 0 && strchr("!#$%&'+-.^_`|~", c) != NULL);
}

asc_names *names_new(void)
{
    return calloc(1, sizeof(asc_names));
}

void names_free(asc_names *set)
{
    if (set == NULL)
        return;
    for (unsigned i = 0; i < set->n; i++)
        free(set->members[i].name);
    free(set);
}

bool names_add(asc_names *set, const char *name, size_t len)
{
    if (len == 0 || len > LONGEST || set->n == MEMBERS)
        return false;
    const char *star = memchr(name, '*', len);
    for (size_t i = 0; i < len; i++)
        if (name + i != star && !token((unsigned char)name[i]))
            return false;
    if (star == NULL && names_has(set, name, len))
        return true;
    member *m = &set->members[set->n];
    m->name = malloc(len);
    if (m->name == NULL)
        return false;
    memcpy(m->name, name, len);
    m->pattern = star != NULL;
    m->prefix = (uint16_t)(star ? (size_t)(star - name) : len);
    m->suffix = (uint16_t)(star ? len - m->prefix - 1 : 0);
    if (m->pattern) {
        set->patterns[set->n_patterns++] = set->n;
    } else {
        uint32_t at = hash_of(name, len) % SLOTS;
        while (set->slots[at])
            at = (at + 1) % SLOTS;
        set->slots[at] = (uint16_t)(set->n + 1);
    }
    set->n++;
    return true;
}

bool names_has(const asc_names *set, const char *name, size_t len)
{
    if (len == 0 || len > LONGEST + 256)
        return false;
    for (uint32_t at = hash_of(name, len) % SLOTS; set->slots[at]; at = (at + 1) % SLOTS) {
        const member *m = &set->members[set->slots[at] - 1];
        if (m->prefix == len && same(name, m->name, len))
            return true;
    }
    for (unsigned i = 0; i < set->n_patterns; i++) {
        const member *m = &set->members[set->patterns[i]];
        if (len >= (size_t)m->prefix + m->suffix && same(name, m->name, m->prefix) &&
            same(name + len - m->suffix, m->name + m->prefix + 1, m->suffix))
            return true;
    }
    return false;
}
