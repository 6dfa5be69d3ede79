/* Incremental JSON scan. See jsonscan.h.
 *
 * One tokenizer, `scan`, is compiled twice: strict (requests: the whole grammar, UTF-8 and the limits are checked) and
 * not (answers: strings and nesting are followed, subtrees in which nothing counts are skipped by looking for quotes
 * and brackets only). It is a state machine whose states are labels, so that a text that lies whole in the buffer runs
 * straight through; where the bytes run out the label is remembered and entered again by the next feed.
 *
 * What is looked for is said by places: a container has a place (TOP, CHOICE, USAGE, ...), a member of interest within
 * a place has a number (M_MODEL, ...), everything else is M_NONE, and a container in which nothing counts is NOWHERE.
 */
#include "jsonscan.h"

#include <stdlib.h>
#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define MAX_DEPTH 64u /* bits of the stack */
#define PLACES 8u     /* depth to which places are remembered; no place lies deeper than 5 */
#define TEXT 64u      /* longest name or text that is compared: response.code_interpreter_call_code.delta has 41 */
#define HIGH_NONE 0u

enum state {
    START,
    VALUE,
    FIRST_VALUE,
    KEY,
    FIRST_KEY,
    COLON,
    AFTER,
    IN_STRING,
    IN_ESCAPE,
    IN_UNICODE,
    IN_UTF8,
    IN_NUMBER,
    IN_LITERAL,
    SKIP,
    DONE,
};

enum kind { STRING, NUMBER, LITERAL_TRUE, LITERAL_FALSE, LITERAL_NULL, OBJECT, ARRAY };

enum place {
    NOWHERE = 0,
    TOP,        /* the outermost object */
    OPTIONS,    /* request: stream_options */
    PARAMETERS, /* request: parameters of TGI */
    USAGE,      /* answers */
    CHOICES,    /* the array */
    CHOICE,     /* an object in it */
    DELTA,      /* its delta or message */
    CALLS,      /* a list in it that counts as content when it is not empty: tool_calls, parts of content */
    ENVELOPE,   /* message of MESSAGES, response of RESPONSES */
    STOP_DELTA, /* delta of MESSAGES */
    DETAILS,    /* details of TGI */
};

enum member {
    M_NONE = 0,
    /* requests */
    M_MODEL,
    M_STREAM,
    M_N,
    M_OPTIONS,
    M_INCLUDE_USAGE,
    M_CONTINUOUS_USAGE,
    M_PARAMETERS,
    M_MAX_COMPLETION_TOKENS, /* these four in order of precedence */
    M_MAX_TOKENS,
    M_MAX_OUTPUT_TOKENS,
    M_MAX_NEW_TOKENS,
    /* answers */
    M_USAGE,
    M_USAGE_IN,
    M_USAGE_OUT,
    M_CHOICES,
    M_FINISH,
    M_STATUS,
    M_DELTA,
    M_CONTENT,
    M_CALLS,
    M_ENVELOPE,
    M_STOP_DELTA,
    M_ERROR,
    M_TYPE,
    M_GENERATED_TEXT,
    M_TOKEN,
    M_DETAILS,
    M_INDEX,
};

struct lexer {
    uint64_t stack;  /* bit 0: the innermost container is an object; bit 1: the one around it; ... */
    uint64_t base;   /* offset of the first byte of this feed */
    uint64_t start;  /* offset of the value under way */
    uint64_t name_at, comma_at; /* at depth 1: offset of the name's quote, and of the comma before it */
    uint64_t len;    /* bytes of the string (unescaped) or number under way that were seen in earlier feeds or runs */
    uint32_t keys, max_keys, max_digits;
    uint16_t unit;   /* a \u escape under way */
    uint16_t high;   /* a high surrogate that must be followed by a low one */
    uint8_t state, depth, max_depth, place, member;
    uint8_t sub;     /* digits of a \u escape; state of a number; position in a literal */
    uint8_t kind;    /* of the literal under way */
    uint8_t utf8_left, utf8_low, utf8_high; /* continuation bytes that must follow, range of the next */
    bool key;        /* the string under way is a member's name */
    bool first;      /* at depth 1: no comma yet */
    uint8_t places[PLACES];
    char text[TEXT]; /* start of the string or number under way, when it was split or escaped and is of interest */
};

struct hash {
    uint64_t state;
    unsigned char block[8];
};

struct json_request {
    struct lexer lexer;
    json_fields fields;
    enum json_error error;
    uint64_t seed;
    struct hash hash;         /* of a top-level name that was split or escaped */
    int64_t tokens[4];        /* the four limits, by precedence */
    uint32_t seen;            /* members of interest below the top level, by number */
    uint64_t *names;          /* open addressing, power of two, 0 is free */
    size_t n_names, capacity;
};

struct answer {
    struct lexer lexer;
    json_facts facts;
    enum json_dialect dialect;
    bool failed, any_choice, usage_open;
};

_Static_assert(sizeof(struct answer) <= sizeof(json_answer), "json_answer holds the scanner");

/* ---- bytes ------------------------------------------------------------------------------------------------------- */

static inline bool is_space(char c)
{
    return c == ' ' || c == '\n' || c == '\r' || c == '\t';
}

static inline const char *space(const char *p, const char *end)
{
    while (p < end && is_space(*p))
        p++;
    return p;
}

/* First byte of a string that ends its plain run: quote or backslash, and if strict a control byte or non-ASCII. */
static inline __attribute__((always_inline)) const char *plain(const char *p, const char *end, const bool strict)
{
#if defined(__SSE2__)
    const __m128i quote = _mm_set1_epi8('"'), backslash = _mm_set1_epi8('\\'), blank = _mm_set1_epi8(0x20);
    for (; end - p >= 16; p += 16) {
        __m128i x = _mm_loadu_si128((const __m128i *)(const void *)p);
        __m128i hit = _mm_or_si128(_mm_cmpeq_epi8(x, quote), _mm_cmpeq_epi8(x, backslash));
        if (strict)
            hit = _mm_or_si128(hit, _mm_cmplt_epi8(x, blank)); /* signed: 0x80.. is below, too */
        unsigned mask = (unsigned)_mm_movemask_epi8(hit);
        if (mask)
            return p + __builtin_ctz(mask);
    }
#else
    for (; end - p >= 8; p += 8) { /* exact up to the first hit of each kind, which is all that is asked */
        const uint64_t ones = 0x0101010101010101u, tops = 0x8080808080808080u;
        uint64_t x;
        memcpy(&x, p, 8);
        uint64_t quote = x ^ ones * '"', backslash = x ^ ones * '\\';
        uint64_t hit = ((quote - ones) & ~quote) | ((backslash - ones) & ~backslash);
        if (strict)
            hit |= x | ((x - ones * 0x20) & ~x);
        if (hit & tops)
            break;
    }
#endif
    while (p < end && *p != '"' && *p != '\\' && !(strict && ((unsigned char)*p < 0x20 || (unsigned char)*p >= 0x80)))
        p++;
    return p;
}

/* First quote or bracket. */
static inline const char *structural(const char *p, const char *end)
{
#if defined(__SSE2__)
    const __m128i quote = _mm_set1_epi8('"'), bit = _mm_set1_epi8(0x20);
    const __m128i open = _mm_set1_epi8('{'), close = _mm_set1_epi8('}');
    for (; end - p >= 16; p += 16) {
        __m128i x = _mm_loadu_si128((const __m128i *)(const void *)p);
        __m128i y = _mm_or_si128(x, bit); /* '[' | 0x20 is '{', ']' | 0x20 is '}' */
        __m128i bracket = _mm_or_si128(_mm_cmpeq_epi8(y, open), _mm_cmpeq_epi8(y, close));
        __m128i hit = _mm_or_si128(_mm_cmpeq_epi8(x, quote), bracket);
        unsigned mask = (unsigned)_mm_movemask_epi8(hit);
        if (mask)
            return p + __builtin_ctz(mask);
    }
#endif
    while (p < end && *p != '"' && (*p | 0x20) != '{' && (*p | 0x20) != '}')
        p++;
    return p;
}

static inline char escaped(char c)
{
    switch (c) {
    case '"':
    case '\\':
    case '/':
        return c;
    case 'b':
        return '\b';
    case 'f':
        return '\f';
    case 'n':
        return '\n';
    case 'r':
        return '\r';
    case 't':
        return '\t';
    default:
        return 0;
    }
}

/* 1 + the value of a hexadecimal digit, 0 for other bytes. */
static const uint8_t digits[256] = {
    ['0'] = 1, ['1'] = 2, ['2'] = 3, ['3'] = 4, ['4'] = 5, ['5'] = 6, ['6'] = 7, ['7'] = 8, ['8'] = 9, ['9'] = 10,
    ['a'] = 11, ['b'] = 12, ['c'] = 13, ['d'] = 14, ['e'] = 15, ['f'] = 16,
    ['A'] = 11, ['B'] = 12, ['C'] = 13, ['D'] = 14, ['E'] = 15, ['F'] = 16,
};

/* Length of the escape at p if it is whole, valid and no surrogate; 0 leaves it to the states that go byte by byte. */
static inline size_t plain_escape(const char *p, const char *end)
{
    const unsigned char *e = (const unsigned char *)p;
    if (end - p < 6)
        return 0;
    if (e[1] != 'u')
        return escaped(p[1]) ? 2 : 0;
    unsigned a = digits[e[2]], b = digits[e[3]];
    bool surrogate = a == 14 && b >= 9; /* D8.. to DF.. */
    return a && b && digits[e[4]] && digits[e[5]] && !surrogate ? 6 : 0;
}

static size_t encode(char out[4], uint32_t point)
{
    if (point < 0x80) {
        out[0] = (char)point;
        return 1;
    }
    if (point < 0x800) {
        out[0] = (char)(0xc0 | point >> 6);
        out[1] = (char)(0x80 | (point & 0x3f));
        return 2;
    }
    if (point < 0x10000) {
        out[0] = (char)(0xe0 | point >> 12);
        out[1] = (char)(0x80 | (point >> 6 & 0x3f));
        out[2] = (char)(0x80 | (point & 0x3f));
        return 3;
    }
    out[0] = (char)(0xf0 | point >> 18);
    out[1] = (char)(0x80 | (point >> 12 & 0x3f));
    out[2] = (char)(0x80 | (point >> 6 & 0x3f));
    out[3] = (char)(0x80 | (point & 0x3f));
    return 4;
}

/* A lead byte of UTF-8 (RFC 3629 4): how many bytes follow and the range of the first of them. */
static inline bool utf8_lead(struct lexer *x, unsigned char c)
{
    if (c < 0xc2 || c > 0xf4)
        return false;
    x->utf8_left = c < 0xe0 ? 1 : c < 0xf0 ? 2 : 3;
    x->utf8_low = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : 0x80;
    x->utf8_high = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : 0xbf;
    return true;
}

/* Pass over whole, valid sequences of two bytes and more; what stops it is judged byte by byte. */
static inline const char *utf8_run(const char *at, const char *end)
{
    const unsigned char *p = (const unsigned char *)at, *stop = (const unsigned char *)end;
    while (stop - p >= 4) { /* one comparison for all lengths; the last bytes of a buffer go the slow way */
        unsigned a = p[0], b = p[1], c = p[2];
        if (a >= 0xe1 && a <= 0xef && a != 0xed) { /* most of the world's text */
            if ((b & 0xc0) != 0x80 || (c & 0xc0) != 0x80)
                break;
            p += 3;
        } else if (a >= 0xc2 && a <= 0xdf) {
            if ((b & 0xc0) != 0x80)
                break;
            p += 2;
        } else if (a == 0xe0 || a == 0xed) {
            if ((b & 0xe0) != (a == 0xe0 ? 0xa0u : 0x80u) || (c & 0xc0) != 0x80)
                break;
            p += 3;
        } else if (a >= 0xf0 && a <= 0xf4) {
            if ((b & 0xc0) != 0x80 || (a == 0xf0 && b < 0x90) || (a == 0xf4 && b > 0x8f) || (c & 0xc0) != 0x80 ||
                (p[3] & 0xc0) != 0x80)
                break;
            p += 4;
        } else {
            break;
        }
    }
    return (const char *)p;
}

/* Numbers: a table of (state, byte class). */
enum { N_START, N_MINUS, N_ZERO, N_INT, N_POINT, N_FRACTION, N_E, N_SIGN, N_EXPONENT, N_BAD };
enum { C_ZERO, C_DIGIT, C_POINT, C_E, C_PLUS, C_MINUS, C_CLASSES };

static const uint8_t number_next[N_BAD + 1][C_CLASSES] = {
    /*              0           1-9         .        e    +       -    */
    [N_START] =    {N_ZERO,     N_INT,      N_BAD,   N_BAD, N_BAD,  N_MINUS},
    [N_MINUS] =    {N_ZERO,     N_INT,      N_BAD,   N_BAD, N_BAD,  N_BAD},
    [N_ZERO] =     {N_BAD,      N_BAD,      N_POINT, N_E,   N_BAD,  N_BAD},
    [N_INT] =      {N_INT,      N_INT,      N_POINT, N_E,   N_BAD,  N_BAD},
    [N_POINT] =    {N_FRACTION, N_FRACTION, N_BAD,   N_BAD, N_BAD,  N_BAD},
    [N_FRACTION] = {N_FRACTION, N_FRACTION, N_BAD,   N_E,   N_BAD,  N_BAD},
    [N_E] =        {N_EXPONENT, N_EXPONENT, N_BAD,   N_BAD, N_SIGN, N_SIGN},
    [N_SIGN] =     {N_EXPONENT, N_EXPONENT, N_BAD,   N_BAD, N_BAD,  N_BAD},
    [N_EXPONENT] = {N_EXPONENT, N_EXPONENT, N_BAD,   N_BAD, N_BAD,  N_BAD},
    [N_BAD] =      {N_BAD,      N_BAD,      N_BAD,   N_BAD, N_BAD,  N_BAD},
};

/* 1 + class of a byte that may stand in a number, 0 for others. */
static const uint8_t number_class[256] = {
    ['0'] = 1 + C_ZERO, ['1' ... '9'] = 1 + C_DIGIT, ['.'] = 1 + C_POINT, ['e'] = 1 + C_E, ['E'] = 1 + C_E,
    ['+'] = 1 + C_PLUS, ['-'] = 1 + C_MINUS,
};

/* A plain non-negative integer of at most 63 bits, or -1. */
static int64_t integer(const char *p, uint64_t len)
{
    if (len == 0 || len > 19)
        return -1;
    uint64_t n = 0;
    for (uint64_t i = 0; i < len; i++) {
        if (p[i] < '0' || p[i] > '9')
            return -1;
        n = n * 10 + (unsigned)(p[i] - '0');
    }
    return n <= INT64_MAX ? (int64_t)n : -1;
}

static inline uint64_t load8(const char *p)
{
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

static inline uint32_t load4(const char *p)
{
    uint32_t x;
    memcpy(&x, p, 4);
    return x;
}

/* memcmp for a length that is known when compiling, which compilers call out for from about 13 bytes on. */
static inline __attribute__((always_inline)) bool equal(const char *a, const char *b, const size_t n)
{
    if (n < 4 || n > 24)
        return memcmp(a, b, n) == 0;
    if (n < 8)
        return load4(a) == load4(b) && load4(a + n - 4) == load4(b + n - 4);
    return load8(a) == load8(b) && load8(a + n - 8) == load8(b + n - 8) && (n <= 16 || load8(a + 8) == load8(b + 8));
}

#define IS(literal) (len == sizeof(literal) - 1 && equal(name, literal, sizeof(literal) - 1))

/* ---- requests ---------------------------------------------------------------------------------------------------- */

/* The names of top-level members are kept as 64-bit seeded hashes. Equal names always meet; two different names that
 * collide (2^-64 a pair, the seed is not known outside) are refused like a duplicate, which harms only their sender. */
static inline uint64_t mix(uint64_t state, uint64_t word)
{
    uint64_t x = (state ^ word) * 0x9e3779b97f4a7c15u;
    x ^= x >> 29;
    x *= 0xbf58476d1ce4e5b9u;
    return x ^ x >> 32;
}

/* `at` bytes of the name were hashed before. */
static void hash_more(struct hash *hash, uint64_t at, const char *p, size_t n)
{
    for (size_t i = 0; i < n; i++, at++) {
        hash->block[at & 7] = (unsigned char)p[i];
        if ((at & 7) == 7)
            hash->state = mix(hash->state, load8((const char *)hash->block));
    }
}

static uint64_t hash_end(struct hash *hash, uint64_t len)
{
    memset(hash->block + (len & 7), 0, 8 - (len & 7));
    uint64_t h = mix(mix(hash->state, load8((const char *)hash->block)), len);
    return h ? h : 1;
}

static bool names_grow(json_request *r)
{
    size_t capacity = r->capacity ? r->capacity * 2 : 64;
    uint64_t *names = calloc(capacity, sizeof *names);
    if (!names)
        return false;
    for (size_t i = 0; i < r->capacity; i++) {
        if (!r->names[i])
            continue;
        size_t at = r->names[i] & (capacity - 1);
        while (names[at])
            at = (at + 1) & (capacity - 1);
        names[at] = r->names[i];
    }
    free(r->names);
    r->names = names;
    r->capacity = capacity;
    return true;
}

static enum json_error names_add(json_request *r, uint64_t h)
{
    if (r->n_names >= r->capacity / 2 && !names_grow(r))
        return JSON_MEMORY;
    size_t at = h & (r->capacity - 1);
    for (; r->names[at]; at = (at + 1) & (r->capacity - 1))
        if (r->names[at] == h)
            return JSON_DUPLICATE;
    r->names[at] = h;
    r->n_names++;
    return JSON_OK;
}

static inline enum member request_member(enum place place, const char *name, uint64_t len)
{
    switch (place) {
    case TOP:
        if (IS("model"))
            return M_MODEL;
        if (IS("stream"))
            return M_STREAM;
        if (IS("max_tokens"))
            return M_MAX_TOKENS;
        if (IS("max_completion_tokens"))
            return M_MAX_COMPLETION_TOKENS;
        if (IS("max_output_tokens"))
            return M_MAX_OUTPUT_TOKENS;
        if (IS("n"))
            return M_N;
        if (IS("stream_options"))
            return M_OPTIONS;
        if (IS("parameters"))
            return M_PARAMETERS;
        return M_NONE;
    case OPTIONS:
        if (IS("include_usage"))
            return M_INCLUDE_USAGE;
        if (IS("continuous_usage_stats"))
            return M_CONTINUOUS_USAGE;
        return M_NONE;
    case PARAMETERS:
        return IS("max_new_tokens") ? M_MAX_NEW_TOKENS : M_NONE;
    default:
        return M_NONE;
    }
}

/* A member's name has ended: name[0..len) holds its first bytes at least, `split`: it was hashed on the way. */
static enum json_error request_key(struct lexer *x, const char *name, uint64_t len, bool split)
{
    json_request *r = (json_request *)(void *)x;
    if (x->keys++ >= x->max_keys)
        return JSON_KEYS;
    x->member = M_NONE;
    if (x->place == NOWHERE)
        return JSON_OK;
    x->member = len <= TEXT ? (uint8_t)request_member((enum place)x->place, name, len) : M_NONE;
    if (x->place != TOP) {
        /* below the top only what is read here must be unique */
        uint32_t bit = 1u << x->member;
        if (x->member != M_NONE && (r->seen & bit))
            return JSON_DUPLICATE;
        r->seen |= bit;
        return JSON_OK;
    }
    r->fields.empty = false;
    if (!split) {
        r->hash.state = r->seed;
        uint64_t at = 0;
        for (; len - at >= 8; at += 8)
            r->hash.state = mix(r->hash.state, load8(name + at));
        memcpy(r->hash.block, name + at, len - at);
    }
    return names_add(r, hash_end(&r->hash, len));
}

static enum json_error tokens_value(int64_t *out, enum kind kind, const char *text, uint64_t len)
{
    if (kind == LITERAL_NULL)
        return JSON_OK;
    if (kind != NUMBER)
        return JSON_FIELD;
    *out = integer(text, len);
    return *out < 0 ? JSON_FIELD : JSON_OK;
}

static enum json_error bool_value(int8_t *out, enum kind kind)
{
    if (kind != LITERAL_TRUE && kind != LITERAL_FALSE && kind != LITERAL_NULL)
        return JSON_FIELD;
    *out = kind == LITERAL_NULL ? -1 : kind == LITERAL_TRUE;
    return JSON_OK;
}

/* A scalar has ended, or a container begins (text is NULL then). */
static enum json_error request_value(struct lexer *x, enum kind kind, const char *text, uint64_t len, uint64_t end)
{
    json_request *r = (json_request *)(void *)x;
    json_fields *f = &r->fields;
    switch ((enum member)x->member) {
    case M_MODEL:
        if (kind != STRING || len > JSON_MODEL_MAX)
            return JSON_FIELD;
        if (text != f->model)
            memcpy(f->model, text, len);
        f->model_len = (uint16_t)len;
        f->has_model = true;
        f->model_off = x->start;
        f->model_raw_len = end - x->start;
        return JSON_OK;
    case M_STREAM:
        return bool_value(&f->stream, kind);
    case M_INCLUDE_USAGE:
        f->include_off = x->start;
        f->include_raw_len = end - x->start;
        return bool_value(&f->include_usage, kind);
    case M_CONTINUOUS_USAGE:
        return bool_value(&f->continuous_usage, kind);
    case M_N:
        return tokens_value(&f->n, kind, text, len);
    case M_MAX_COMPLETION_TOKENS:
    case M_MAX_TOKENS:
    case M_MAX_OUTPUT_TOKENS:
    case M_MAX_NEW_TOKENS:
        return tokens_value(&r->tokens[x->member - M_MAX_COMPLETION_TOKENS], kind, text, len);
    case M_OPTIONS:
        if (kind != OBJECT && kind != LITERAL_NULL)
            return JSON_FIELD;
        f->options_off = x->start;
        f->options_raw_len = end - x->start; /* of an object: set when it closes */
        return JSON_OK;
    default:
        return JSON_OK;
    }
}

static enum place request_place(const struct lexer *x, enum kind kind)
{
    if (kind != OBJECT)
        return NOWHERE;
    if (x->depth == 0)
        return TOP;
    return x->member == M_OPTIONS ? OPTIONS : x->member == M_PARAMETERS ? PARAMETERS : NOWHERE;
}

static void request_close(struct lexer *x, uint64_t end)
{
    json_fields *f = &((json_request *)(void *)x)->fields;
    if (x->place == OPTIONS)
        f->options_raw_len = end - f->options_off;
}

/* ---- answers ----------------------------------------------------------------------------------------------------- */

static inline enum member answer_top(enum json_dialect dialect, const char *name, uint64_t len)
{
    switch (len) {
    case 4:
        if (dialect != JSON_OPENAI && dialect != JSON_TGI && IS("type"))
            return M_TYPE;
        return M_NONE;
    case 5:
        if (IS("usage"))
            return dialect == JSON_TGI ? M_NONE : M_USAGE;
        if (IS("error"))
            return M_ERROR;
        if (dialect == JSON_MESSAGES && IS("delta"))
            return M_STOP_DELTA;
        if (dialect == JSON_TGI && IS("token"))
            return M_TOKEN;
        return M_NONE;
    case 6:
        return dialect == JSON_RESPONSES && IS("status") ? M_STATUS : M_NONE;
    case 7:
        if (dialect == JSON_OPENAI && IS("choices"))
            return M_CHOICES;
        if (dialect == JSON_MESSAGES && IS("message"))
            return M_ENVELOPE;
        if (dialect == JSON_TGI && IS("details"))
            return M_DETAILS;
        return M_NONE;
    case 8:
        return dialect == JSON_RESPONSES && IS("response") ? M_ENVELOPE : M_NONE;
    case 11:
        return dialect == JSON_MESSAGES && IS("stop_reason") ? M_FINISH : M_NONE;
    case 14:
        return dialect == JSON_TGI && IS("generated_text") ? M_GENERATED_TEXT : M_NONE;
    default:
        return M_NONE;
    }
}

static inline enum member answer_member(const struct answer *a, enum place place, const char *name, uint64_t len)
{
    switch (place) {
    case TOP:
        return answer_top(a->dialect, name, len);
    case USAGE:
        if (a->dialect == JSON_OPENAI)
            return IS("prompt_tokens") ? M_USAGE_IN : IS("completion_tokens") ? M_USAGE_OUT : M_NONE;
        return IS("input_tokens") ? M_USAGE_IN : IS("output_tokens") ? M_USAGE_OUT : M_NONE;
    case CHOICE:
        if (IS("delta") || IS("message"))
            return M_DELTA;
        return IS("finish_reason") ? M_FINISH : IS("text") ? M_CONTENT : IS("index") ? M_INDEX : M_NONE;
    case DELTA:
        if (IS("content") || IS("reasoning") || IS("reasoning_content") || IS("refusal"))
            return M_CONTENT;
        return IS("tool_calls") || IS("function_call") ? M_CALLS : M_NONE;
    case ENVELOPE:
        if (IS("usage"))
            return M_USAGE;
        if (a->dialect == JSON_MESSAGES)
            return IS("stop_reason") ? M_FINISH : M_NONE;
        return IS("status") ? M_STATUS : M_NONE;
    case STOP_DELTA:
        return IS("stop_reason") ? M_FINISH : M_NONE;
    case DETAILS:
        if (IS("finish_reason"))
            return M_FINISH;
        return IS("generated_tokens") ? M_USAGE_OUT : IS("input_length") ? M_USAGE_IN : M_NONE;
    default:
        return M_NONE;
    }
}

static enum json_finish finish_of(const char *name, uint64_t len)
{
    if (IS("stop") || IS("end_turn") || IS("stop_sequence") || IS("eos_token"))
        return FINISH_STOP;
    if (IS("length") || IS("max_tokens"))
        return FINISH_LENGTH;
    if (IS("tool_calls") || IS("tool_use") || IS("function_call"))
        return FINISH_TOOL;
    if (IS("content_filter") || IS("refusal"))
        return FINISH_FILTER;
    if (IS("abort"))
        return FINISH_ABORT;
    return IS("error") ? FINISH_ERROR : FINISH_OTHER;
}

/* The status of a response (RESPONSES): one that is under way has not finished. */
static enum json_finish status_of(const char *name, uint64_t len)
{
    if (IS("in_progress") || IS("queued"))
        return FINISH_NONE;
    if (IS("completed"))
        return FINISH_STOP;
    if (IS("incomplete"))
        return FINISH_LENGTH;
    if (IS("cancelled"))
        return FINISH_ABORT;
    return IS("failed") ? FINISH_ERROR : FINISH_OTHER;
}

static void answer_type(struct answer *a, const char *name, uint64_t len)
{
    json_facts *f = &a->facts;
    f->type_len = (uint8_t)(len < sizeof f->type ? len : sizeof f->type);
    memcpy(f->type, name, f->type_len);
    if (len > TEXT)
        return; /* only its start is known */
    if (IS("error"))
        f->has_error = true;
    if (a->dialect == JSON_MESSAGES)
        f->has_content |= IS("content_block_delta");
    else
        f->has_content |= len > 6 && memcmp(name + len - 6, ".delta", 6) == 0;
}

/* The member ,"usage":... at the top ends; `end` is the offset behind it. As the first member it takes the comma behind
 * it along. */
static void answer_usage(struct answer *a, uint64_t end)
{
    const struct lexer *x = &a->lexer;
    a->facts.usage_off = x->first ? x->name_at : x->comma_at;
    a->facts.usage_raw_len = end - a->facts.usage_off;
    a->usage_open = x->first;
}

/* As request_value. Values of other types than those expected are ignored. */
static void answer_value(struct lexer *x, enum kind kind, const char *text, uint64_t len, uint64_t end)
{
    struct answer *a = (struct answer *)(void *)x;
    json_facts *f = &a->facts;
    int64_t n;
    switch ((enum member)x->member) {
    case M_USAGE_IN:
    case M_USAGE_OUT:
        if (kind == NUMBER && (n = integer(text, len)) >= 0)
            *(x->member == M_USAGE_IN ? &f->usage_in : &f->usage_out) = n;
        return;
    case M_USAGE:
        if (kind == LITERAL_NULL && x->place == TOP && a->dialect == JSON_OPENAI)
            answer_usage(a, end);
        return;
    case M_INDEX:
        if (kind == NUMBER && (n = integer(text, len)) >= 0 && n <= INT32_MAX)
            f->index = (int32_t)n;
        return;
    case M_FINISH:
    case M_STATUS:
        if (kind == STRING) {
            enum json_finish finish = x->member == M_FINISH ? finish_of(text, len) : status_of(text, len);
            if (finish != FINISH_NONE)
                f->finish = (uint8_t)finish;
        }
        return;
    case M_CONTENT:
        /* a list counts when it has a part: answer_first */
        f->has_content |= kind == OBJECT || (kind == STRING && len > 0);
        return;
    case M_CALLS:
    case M_TOKEN:
        f->has_content |= kind == OBJECT;
        return;
    case M_ERROR:
        f->has_error |= kind != LITERAL_NULL;
        return;
    case M_TYPE:
        if (kind == STRING)
            answer_type(a, text, len);
        return;
    case M_GENERATED_TEXT:
        f->final_text |= kind == STRING;
        return;
    default:
        return;
    }
}

static enum place answer_place(const struct lexer *x, enum kind kind)
{
    if (x->depth == 0)
        return kind == OBJECT ? TOP : NOWHERE;
    if (kind == ARRAY)
        return x->member == M_CHOICES ? CHOICES : x->member == M_CALLS || x->member == M_CONTENT ? CALLS : NOWHERE;
    if (x->place == CHOICES)
        return CHOICE;
    switch ((enum member)x->member) {
    case M_USAGE:
        return USAGE;
    case M_DELTA:
        return DELTA;
    case M_ENVELOPE:
        return ENVELOPE;
    case M_STOP_DELTA:
        return STOP_DELTA;
    case M_DETAILS:
        return DETAILS;
    default:
        return NOWHERE;
    }
}

/* An array is not empty. */
static void answer_first(struct lexer *x)
{
    struct answer *a = (struct answer *)(void *)x;
    if (x->place == CHOICES)
        a->any_choice = true;
    else if (x->place == CALLS)
        a->facts.has_content = true;
}

/* A container ends; `end` is the offset behind it. */
static void answer_close(struct lexer *x, uint64_t end)
{
    struct answer *a = (struct answer *)(void *)x;
    if (x->place == CHOICES) {
        a->facts.choices_empty = !a->any_choice;
    } else if (x->place == USAGE && x->depth == 2 && a->dialect == JSON_OPENAI) {
        answer_usage(a, end);
    }
}

/* A comma at depth 1. */
static inline void answer_comma(struct lexer *x, uint64_t at)
{
    struct answer *a = (struct answer *)(void *)x;
    x->comma_at = at;
    x->first = false;
    if (a->usage_open) {
        a->usage_open = false;
        a->facts.usage_raw_len = at + 1 - a->facts.usage_off;
    }
}

/* ---- the tokenizer ----------------------------------------------------------------------------------------------- */

static const char literals[][6] = {[LITERAL_TRUE] = "true", [LITERAL_FALSE] = "false", [LITERAL_NULL] = "null"};

/* Where the text of the string or number under way is kept when it does not lie in one piece in the buffer. */
static inline __attribute__((always_inline)) char *text_of(struct lexer *x, size_t *cap, const bool strict)
{
    if (strict && x->member == M_MODEL && !x->key) {
        *cap = JSON_MODEL_MAX;
        return ((json_request *)(void *)x)->fields.model;
    }
    *cap = TEXT;
    return x->text;
}

static inline __attribute__((always_inline)) void keep(struct lexer *x, const char *p, size_t n, const bool strict)
{
    if (!x->key && x->member == M_NONE)
        return;
    size_t cap;
    char *text = text_of(x, &cap, strict);
    if (x->len < cap)
        memcpy(text + x->len, p, n < cap - x->len ? n : cap - x->len);
    if (strict && x->key && x->depth == 1) {
        json_request *r = (json_request *)(void *)x;
        if (x->len == 0)
            r->hash.state = r->seed;
        hash_more(&r->hash, x->len, p, n);
    }
    x->len += n;
}

static inline __attribute__((always_inline)) enum json_error value_ended(struct lexer *x, enum kind kind,
                                                                         const char *text, uint64_t len, uint64_t end,
                                                                         const bool strict)
{
    if (x->member == M_NONE)
        return JSON_OK;
    if (strict)
        return request_value(x, kind, text, len, end);
    answer_value(x, kind, text, len, end);
    return JSON_OK;
}

/* Consume bytes[0..len). base is moved on by what was consumed. */
static inline __attribute__((always_inline)) enum json_error scan(struct lexer *x, const char *bytes, size_t len,
                                                                  const bool strict)
{
    const char *p = bytes, *const end = bytes + len;
    enum json_error error = JSON_OK;
    enum kind kind;

#define OFFSET(at) (x->base + (uint64_t)((at) - bytes))
#define FAIL(why) \
    do { \
        error = (why); \
        goto out; \
    } while (0)
#define NEED(resume) \
    do { \
        if (p == end) { \
            x->state = (resume); \
            goto out; \
        } \
    } while (0)

    switch ((enum state)x->state) {
    case START:
        goto start;
    case VALUE:
        goto value;
    case FIRST_VALUE:
        goto first_value;
    case KEY:
        goto key;
    case FIRST_KEY:
        goto first_key;
    case COLON:
        goto colon;
    case AFTER:
        goto after;
    case IN_STRING:
        goto string;
    case IN_ESCAPE:
        goto escape;
    case IN_UNICODE:
        goto unicode;
    case IN_UTF8:
        goto utf8;
    case IN_NUMBER:
        goto number;
    case IN_LITERAL:
        goto literal;
    case SKIP:
        goto skip;
    case DONE:
        goto done;
    }

start:
    p = space(p, end);
    NEED(START);
    if (strict && *p != '{')
        FAIL(*p && strchr("[\"-0123456789tfn", *p) ? JSON_NOT_OBJECT : JSON_SYNTAX);
    goto value;

first_value:
    p = space(p, end);
    NEED(FIRST_VALUE);
    if (*p == ']')
        goto after;
    if (!strict)
        answer_first(x);

value:
    p = space(p, end);
    NEED(VALUE);
    x->start = OFFSET(p);
    switch (*p) {
    case '"':
        p++;
        x->len = 0;
        x->key = false;
        goto string;
    case '{':
        kind = OBJECT;
        goto open;
    case '[':
        kind = ARRAY;
        goto open;
    case 't':
        x->kind = LITERAL_TRUE;
        x->sub = 0;
        goto literal;
    case 'f':
        x->kind = LITERAL_FALSE;
        x->sub = 0;
        goto literal;
    case 'n':
        x->kind = LITERAL_NULL;
        x->sub = 0;
        goto literal;
    default:
        if (number_class[(unsigned char)*p] == 0)
            FAIL(JSON_SYNTAX);
        x->len = 0;
        x->sub = N_START;
        goto number;
    }

open:
    if (x->depth >= x->max_depth)
        FAIL(JSON_DEPTH);
    if ((error = value_ended(x, kind, NULL, 0, OFFSET(p), strict)))
        goto out;
    x->place = (uint8_t)(strict ? request_place(x, kind) : answer_place(x, kind));
    x->depth++;
    if (x->depth < PLACES)
        x->places[x->depth] = x->place;
    x->stack = x->stack << 1 | (kind == OBJECT);
    x->member = M_NONE;
    p++;
    if (strict && x->depth == 1)
        ((json_request *)(void *)x)->fields.open_off = OFFSET(p);
    if (!strict && x->place == NOWHERE)
        goto skip;
    if (kind == ARRAY)
        goto first_value;

first_key:
    p = space(p, end);
    NEED(FIRST_KEY);
    if (*p == '}')
        goto after;
    goto key;

key:
    p = space(p, end);
    NEED(KEY);
    if (*p != '"')
        FAIL(JSON_SYNTAX);
    if (!strict && x->depth == 1)
        x->name_at = OFFSET(p);
    p++;
    x->len = 0;
    x->key = true;
    goto string;

colon:
    p = space(p, end);
    NEED(COLON);
    if (*p != ':')
        FAIL(JSON_SYNTAX);
    p++;
    goto value;

after:
    p = space(p, end);
    NEED(AFTER);
    if (*p == ',') {
        if (!strict && x->depth == 1)
            answer_comma(x, OFFSET(p));
        p++;
        if (x->stack & 1)
            goto key;
        x->member = M_NONE;
        goto value;
    }
    if (*p != (x->stack & 1 ? '}' : ']'))
        FAIL(JSON_SYNTAX);
    p++;
    if (strict)
        request_close(x, OFFSET(p));
    else
        answer_close(x, OFFSET(p));
    x->stack >>= 1;
    x->depth--;
    x->place = x->depth < PLACES ? x->places[x->depth] : NOWHERE;
    if (x->depth == 0)
        goto done;
    if (!strict && x->place == NOWHERE)
        goto skip;
    goto after;

string:
    for (;;) {
        NEED(IN_STRING);
        if (x->high != HIGH_NONE && *p != '\\') {
            if (strict)
                FAIL(JSON_SYNTAX); /* a lone surrogate */
            x->high = HIGH_NONE;
        }
        const char *run = p;
        p = plain(p, end, strict);
        if (p == end) {
            keep(x, run, (size_t)(p - run), strict);
            continue;
        }
        if (*p == '"') {
            const char *text = run;
            uint64_t text_len = (uint64_t)(p - run);
            bool split = x->len > 0;
            if (split) {
                size_t cap;
                keep(x, run, (size_t)(p - run), strict);
                text = text_of(x, &cap, strict);
                text_len = x->len;
            }
            p++;
            if (x->key) {
                if (strict) {
                    if ((error = request_key(x, text, text_len, split)))
                        goto out;
                } else {
                    struct answer *a = (struct answer *)(void *)x;
                    x->member = M_NONE;
                    if (text_len <= TEXT)
                        x->member = (uint8_t)answer_member(a, (enum place)x->place, text, text_len);
                }
                goto colon;
            }
            if ((error = value_ended(x, STRING, text, text_len, OFFSET(p), strict)))
                goto out;
            if (x->depth == 0)
                goto done;
            if (!strict && x->place == NOWHERE)
                goto skip;
            goto after;
        }
        keep(x, run, (size_t)(p - run), strict);
        if (*p == '\\') {
            if (!x->key && x->member == M_NONE && x->high == HIGH_NONE) {
                size_t n = plain_escape(p, end);
                if (n > 0) {
                    p += n;
                    continue;
                }
            }
            p++;
            goto escape;
        }
        if ((unsigned char)*p < 0x20)
            FAIL(JSON_SYNTAX);
        run = p;
        p = utf8_run(p, end);
        keep(x, run, (size_t)(p - run), strict);
        if (p == end || (unsigned char)*p < 0x80)
            continue;
        if (!utf8_lead(x, (unsigned char)*p))
            FAIL(JSON_SYNTAX);
        keep(x, p++, 1, strict);
    utf8: /* strict only */
        while (x->utf8_left) {
            NEED(IN_UTF8);
            if ((unsigned char)*p < x->utf8_low || (unsigned char)*p > x->utf8_high)
                FAIL(JSON_SYNTAX);
            x->utf8_low = 0x80;
            x->utf8_high = 0xbf;
            x->utf8_left--;
            keep(x, p++, 1, strict);
        }
    }

escape:
    NEED(IN_ESCAPE);
    if (*p == 'u') {
        p++;
        x->sub = 0;
        x->unit = 0;
        goto unicode;
    } else {
        char c = escaped(*p++);
        if (c == 0 || (strict && x->high != HIGH_NONE))
            FAIL(JSON_SYNTAX);
        x->high = HIGH_NONE;
        keep(x, &c, 1, strict);
        goto string;
    }

unicode:
    while (x->sub < 4) {
        NEED(IN_UNICODE);
        int digit = digits[(unsigned char)*p++] - 1;
        if (digit < 0)
            FAIL(JSON_SYNTAX);
        x->unit = (uint16_t)(x->unit << 4 | digit);
        x->sub++;
    }
    {
        uint32_t point = x->unit;
        bool low = (point & 0xfc00) == 0xdc00;
        if (strict && low != (x->high != HIGH_NONE))
            FAIL(JSON_SYNTAX); /* a low half alone, or none where it must be */
        if ((point & 0xfc00) == 0xd800) {
            x->high = x->unit;
            goto string;
        }
        if (low && x->high != HIGH_NONE)
            point = 0x10000 + ((uint32_t)(x->high - 0xd800) << 10) + (point - 0xdc00);
        x->high = HIGH_NONE;
        char utf8[4];
        size_t n = encode(utf8, point);
        keep(x, utf8, n, strict);
        goto string;
    }

number:
    {
        const char *run = p;
        unsigned sub = x->sub, class;
        const uint64_t room = x->max_digits - x->len;
        while (p < end && (class = number_class[(unsigned char)*p])) {
            if (strict) {
                if ((uint64_t)(p - run) >= room)
                    FAIL(JSON_NUMBER);
                sub = number_next[sub][class - 1];
                if (sub == N_BAD)
                    FAIL(JSON_SYNTAX);
            }
            p++;
        }
        x->sub = (uint8_t)sub;
        const char *text = run;
        uint64_t text_len = (uint64_t)(p - run);
        if (p == end || x->len > 0) {
            /* counted in any case, for the limit */
            uint64_t before = x->len;
            keep(x, run, (size_t)(p - run), strict);
            x->len = before + (uint64_t)(p - run);
            NEED(IN_NUMBER);
            text = x->text;
            text_len = x->len <= TEXT ? x->len : 0;
        }
        if (strict && sub != N_ZERO && sub != N_INT && sub != N_FRACTION && sub != N_EXPONENT)
            FAIL(JSON_SYNTAX);
        if ((error = value_ended(x, NUMBER, text, text_len, OFFSET(p), strict)))
            goto out;
        if (x->depth == 0)
            goto done;
        goto after;
    }

literal:
    {
        const char *word = literals[x->kind];
        for (; word[x->sub]; p++, x->sub++) {
            NEED(IN_LITERAL);
            if (*p != word[x->sub])
                FAIL(JSON_SYNTAX);
        }
        if ((error = value_ended(x, (enum kind)x->kind, NULL, 0, OFFSET(p), strict)))
            goto out;
        if (x->depth == 0)
            goto done;
        goto after;
    }

skip: /* answers only: in a container in which nothing counts */
    for (;;) {
        p = structural(p, end);
        NEED(SKIP);
        char c = *p++;
        if (c == '"') {
            x->len = 0;
            x->key = false;
            x->member = M_NONE;
            goto string;
        }
        if (c == '{' || c == '[') {
            if (x->depth >= x->max_depth)
                FAIL(JSON_DEPTH);
            x->stack = x->stack << 1 | (c == '{');
            x->depth++;
            if (x->depth < PLACES)
                x->places[x->depth] = NOWHERE;
            continue;
        }
        if (c != (x->stack & 1 ? '}' : ']'))
            FAIL(JSON_SYNTAX);
        x->stack >>= 1;
        x->depth--;
        x->place = x->depth < PLACES ? x->places[x->depth] : NOWHERE;
        if (x->depth == 0)
            goto done;
        if (x->place != NOWHERE)
            goto after;
    }

done:
    p = space(p, end);
    if (p < end)
        FAIL(JSON_TRAILING);
    x->state = DONE;

out:
    x->base += (uint64_t)(p - bytes);
    return error;

#undef OFFSET
#undef FAIL
#undef NEED
}

/* ---- entry ------------------------------------------------------------------------------------------------------- */

#define NAMES_KEPT (65536u / sizeof(uint64_t))

json_request *json_request_new(void)
{
    return calloc(1, sizeof(json_request));
}

void json_request_free(json_request *r)
{
    if (r)
        free(r->names);
    free(r);
}

void json_request_start(json_request *r, const json_limits *limits, uint64_t seed)
{
    if (r->capacity > NAMES_KEPT) {
        free(r->names);
        r->names = NULL;
        r->capacity = r->n_names = 0;
    }
    if (r->n_names)
        memset(r->names, 0, r->capacity * sizeof *r->names);
    r->n_names = 0;
    memset(&r->lexer, 0, offsetof(struct lexer, text));
    r->lexer.max_depth = (uint8_t)(limits->max_depth < MAX_DEPTH ? limits->max_depth : MAX_DEPTH);
    r->lexer.max_keys = limits->max_keys;
    r->lexer.max_digits = limits->max_digits;
    memset(&r->fields, 0, sizeof r->fields);
    r->fields.stream = r->fields.include_usage = r->fields.continuous_usage = -1;
    r->fields.max_tokens = r->fields.n = -1;
    r->fields.empty = true;
    for (size_t i = 0; i < 4; i++)
        r->tokens[i] = -1;
    r->seen = 0;
    r->seed = seed;
    r->error = JSON_OK;
}

enum json_error json_request_feed(json_request *r, const char *bytes, size_t len)
{
    if (r->error == JSON_OK)
        r->error = scan(&r->lexer, bytes, len, true);
    return r->error;
}

enum json_error json_request_end(json_request *r)
{
    if (r->error == JSON_OK && r->lexer.state != DONE)
        r->error = r->lexer.state == START ? JSON_SYNTAX : JSON_TRUNCATED;
    for (size_t i = 4; i-- > 0;)
        if (r->tokens[i] >= 0)
            r->fields.max_tokens = r->tokens[i];
    return r->error;
}

const json_fields *json_request_fields(const json_request *r)
{
    return &r->fields;
}

uint64_t json_request_offset(const json_request *r)
{
    return r->lexer.base;
}

const char *json_error_sentence(enum json_error error)
{
    switch (error) {
    case JSON_OK:
        return "no error";
    case JSON_SYNTAX:
        return "the body is not valid JSON";
    case JSON_NOT_OBJECT:
        return "the body is not a JSON object";
    case JSON_TRUNCATED:
        return "the body ends inside the JSON object";
    case JSON_TRAILING:
        return "the body goes on after the JSON object";
    case JSON_DUPLICATE:
        return "a member of the JSON object is given twice";
    case JSON_DEPTH:
        return "the JSON is nested too deeply";
    case JSON_KEYS:
        return "the JSON has too many members";
    case JSON_NUMBER:
        return "the JSON has a number with too many digits";
    case JSON_FIELD:
        return "a member of the JSON object has the wrong type";
    case JSON_MEMORY:
        return "no memory to read the JSON";
    }
    return "unknown error";
}

static inline struct answer *answer_of(json_answer *scan)
{
    return (struct answer *)(void *)scan->opaque;
}

void json_answer_start(json_answer *scan, enum json_dialect dialect)
{
    struct answer *a = answer_of(scan);
    memset(&a->lexer, 0, offsetof(struct lexer, text));
    a->lexer.max_depth = MAX_DEPTH;
    a->lexer.first = true;
    memset(&a->facts, 0, sizeof a->facts);
    a->facts.usage_in = a->facts.usage_out = a->facts.index = -1;
    a->dialect = dialect;
    a->failed = a->any_choice = a->usage_open = false;
}

bool json_answer_feed(json_answer *state, const char *bytes, size_t len)
{
    struct answer *a = answer_of(state);
    if (a->dialect == JSON_NONE)
        return true;
    if (!a->failed)
        a->failed = scan(&a->lexer, bytes, len, false) != JSON_OK;
    return !a->failed;
}

const json_facts *json_answer_facts(const json_answer *scan)
{
    return &((const struct answer *)(const void *)scan->opaque)->facts;
}
