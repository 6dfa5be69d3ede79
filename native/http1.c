/* Strict HTTP/1.1 heads. See http1.h for what is refused.
 *
 * One pass over the bytes: each byte is looked up once in a class table (names, target) or compared 16 at a time
 * (values). A partial head is parsed again only when a new LF arrived, of which there are at most max_fields + 2, so
 * the work for a head that trickles in is bounded by its size times the limits and not by the number of reads.
 */
#include "http1.h"

#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define CONTENT_LENGTH_DIGITS 19u /* INT64_MAX has 19: longer is an overflow or padding that others read otherwise */
#define METHOD_MAX 32u
#define LIMIT_STRIDE 1024u /* a growing line is measured each time this many bytes arrived */

enum {
    TOKEN = 1,  /* RFC 9110 5.6.2 tchar */
    PATH = 2,   /* RFC 3986 pchar and '/', without '%' */
    QUERY = 4,  /* PATH and '?' */
    HEX = 8,
    DIGIT = 16,
    HOST = 32,  /* RFC 3986 unreserved; the rest of reg-name (sub-delims, "%") is in no DNS name and reads as a list */
};

#define ALNUM (TOKEN | PATH | QUERY | HOST)
#define MARK (TOKEN | PATH | QUERY)      /* sub-delims that are tchar too */
#define PUNCTUATION (PATH | QUERY)       /* what is left of pchar and '/' */

static const uint8_t classes[256] = {
    ['0' ... '9'] = ALNUM | HEX | DIGIT,
    ['A' ... 'F'] = ALNUM | HEX,
    ['G' ... 'Z'] = ALNUM,
    ['a' ... 'f'] = ALNUM | HEX,
    ['g' ... 'z'] = ALNUM,
    ['-'] = ALNUM, ['.'] = ALNUM, ['_'] = ALNUM, ['~'] = ALNUM,
    ['!'] = MARK, ['$'] = MARK, ['&'] = MARK, ['\''] = MARK, ['*'] = MARK, ['+'] = MARK,
    ['#'] = TOKEN, ['%'] = TOKEN, ['^'] = TOKEN, ['`'] = TOKEN, ['|'] = TOKEN,
    ['('] = PUNCTUATION, [')'] = PUNCTUATION, [','] = PUNCTUATION, [';'] = PUNCTUATION, ['='] = PUNCTUATION,
    [':'] = PUNCTUATION, ['@'] = PUNCTUATION, ['/'] = PUNCTUATION,
    ['?'] = QUERY,
};

static inline bool is(char c, unsigned class)
{
    return classes[(unsigned char)c] & class;
}

static inline char lower(char c)
{
    return (unsigned)(c - 'A') < 26u ? (char)(c + 32) : c;
}

static enum http1_result fail(http1_head *head, enum http1_reject reject, const char *why)
{
    head->reject = (uint8_t)reject;
    head->why = why;
    return HTTP1_ERROR;
}

static enum http1_result over(http1_head *head, enum http1_over limit, const char *why)
{
    head->over = (uint8_t)limit;
    return fail(head, limit == HTTP1_OVER_LINE ? HTTP1_LINE_TOO_LONG : HTTP1_FIELDS_TOO_LARGE, why);
}

static enum http1_result bad(http1_head *head, const char *why)
{
    return fail(head, HTTP1_BAD_REQUEST, why);
}

static inline asc_span span(const char *buf, const char *from, const char *to)
{
    return (asc_span){(uint32_t)(from - buf), (uint32_t)(to - from)};
}

/* First control byte other than HTAB in [p, end), or end. */
static inline const char *control(const char *p, const char *end)
{
#if defined(__SSE2__)
    const __m128i space = _mm_set1_epi8(0x1f), tab = _mm_set1_epi8('\t'), del = _mm_set1_epi8(0x7f);
    for (; end - p >= 16; p += 16) {
        __m128i x = _mm_loadu_si128((const __m128i *)(const void *)p);
        __m128i low = _mm_cmpeq_epi8(_mm_min_epu8(x, space), x);
        __m128i hit = _mm_or_si128(_mm_andnot_si128(_mm_cmpeq_epi8(x, tab), low), _mm_cmpeq_epi8(x, del));
        unsigned mask = (unsigned)_mm_movemask_epi8(hit);
        if (mask)
            return p + __builtin_ctz(mask);
    }
#endif
    while (p < end) {
        unsigned char c = (unsigned char)*p;
        if ((c < 0x20 && c != '\t') || c == 0x7f)
            return p;
        p++;
    }
    return end;
}

/* ---- names ------------------------------------------------------------------------------------------------------- */

static inline uint64_t load8(const char *p)
{
    uint64_t x;
    memcpy(&x, p, 8);
    return x | 0x2020202020202020u;
}

static inline uint32_t load4(const char *p)
{
    uint32_t x;
    memcpy(&x, p, 4);
    return x | 0x20202020u;
}

/* Compare n (4..24) bytes of a token with a literal of lower-case letters and '-'. Setting bit 5 is exact here: among
 * token bytes only a capital turns into a letter, and only '-' into '-'. */
static inline bool same(const char *name, const char *literal, size_t n)
{
    if (n < 8)
        return load4(name) == load4(literal) && load4(name + n - 4) == load4(literal + n - 4);
    if (load8(name) != load8(literal) || load8(name + n - 8) != load8(literal + n - 8))
        return false;
    return n <= 16 || load8(name + 8) == load8(literal + 8);
}

#define NAME(literal, id) \
    if (same(name, literal, sizeof(literal) - 1)) \
    return id

static enum http1_name identify(const char *name, size_t len)
{
    switch (len) {
    case 4:
        NAME("host", HTTP1_HOST);
        NAME("date", HTTP1_DATE);
        break;
    case 6:
        NAME("expect", HTTP1_EXPECT);
        break;
    case 7:
        NAME("upgrade", HTTP1_UPGRADE);
        NAME("api-key", HTTP1_API_KEY);
        break;
    case 9:
        NAME("x-api-key", HTTP1_X_API_KEY);
        break;
    case 10:
        NAME("connection", HTTP1_CONNECTION);
        break;
    case 11:
        NAME("retry-after", HTTP1_RETRY_AFTER);
        break;
    case 12:
        NAME("content-type", HTTP1_CONTENT_TYPE);
        NAME("x-request-id", HTTP1_X_REQUEST_ID);
        break;
    case 13:
        NAME("authorization", HTTP1_AUTHORIZATION);
        break;
    case 14:
        NAME("content-length", HTTP1_CONTENT_LENGTH);
        break;
    case 16:
        NAME("content-encoding", HTTP1_CONTENT_ENCODING);
        NAME("x-ascproxy-model", HTTP1_X_ASCPROXY_MODEL);
        break;
    case 17:
        NAME("transfer-encoding", HTTP1_TRANSFER_ENCODING);
        break;
    default:
        break;
    }
    return HTTP1_OTHER;
}

static bool equal_without_dashes(const char *name, size_t len, const char *letters)
{
    for (size_t i = 0; i < len; i++) {
        if (name[i] == '-' || name[i] == '_')
            continue;
        if (*letters == 0 || lower(name[i]) != *letters)
            return false;
        letters++;
    }
    return *letters == 0;
}

/* A name that a lenient peer (CGI's HTTP_CONTENT_LENGTH) takes for a framing field. */
static inline bool disguised(const char *name, size_t len)
{
    if (len < 13)
        return false;
    char first = lower(name[0]);
    if (first != 'c' && first != 't' && first != '-' && first != '_')
        return false;
    return equal_without_dashes(name, len, "contentlength") || equal_without_dashes(name, len, "transferencoding");
}

bool http1_name_is(const char *name, size_t len, const char *literal, size_t literal_len)
{
    if (len != literal_len)
        return false;
    for (size_t i = 0; i < len; i++)
        if (lower(name[i]) != literal[i])
            return false;
    return true;
}

/* ---- lines ------------------------------------------------------------------------------------------------------- */

/* The bytes run out in the line that starts at `line`. One byte over the limit may still be its CR. */
static enum http1_result partial(http1_head *head, const char *line, const char *end, uint32_t limit, bool first_line)
{
    if ((size_t)(end - line) <= (size_t)limit + 1)
        return HTTP1_PARTIAL;
    if (first_line)
        return over(head, HTTP1_OVER_LINE, "first line too long");
    return over(head, HTTP1_OVER_FIELD, "field line too long");
}

static enum http1_result parse_fields(http1_head *head, const char *buf, const char *p, const char *end,
                                      const http1_limits *limits)
{
    uint32_t max_fields = limits->max_fields < HTTP1_MAX_FIELDS ? limits->max_fields : HTTP1_MAX_FIELDS;
    for (;;) {
        const char *line = p;
        if (p == end)
            return HTTP1_PARTIAL;
        if (*p == '\r') {
            if (end - p < 2)
                return HTTP1_PARTIAL;
            if (p[1] != '\n')
                return bad(head, "bare CR");
            head->head_len = (uint32_t)(p + 2 - buf);
            return HTTP1_DONE;
        }
        while (p < end && is(*p, TOKEN))
            p++;
        if (p == end)
            return partial(head, line, end, limits->max_field, false);
        if (*p != ':' || p == line) {
            if (*p == ' ' || *p == '\t')
                return bad(head, p == line ? "white space before a field, or a folded line" : "white space in a name");
            return bad(head, *p == '\n' ? "bare LF" : "not a field line");
        }
        if (head->n_fields == max_fields)
            return over(head, HTTP1_OVER_FIELDS, "too many fields");
        const char *name_end = p++;
        while (p < end && (*p == ' ' || *p == '\t'))
            p++;
        const char *value = p;
        p = control(p, end);
        if (end - p < 2) {
            if (p < end && *p != '\r')
                return bad(head, *p == '\n' ? "bare LF" : "control byte in a field value");
            return partial(head, line, end, limits->max_field, false);
        }
        if (p[0] != '\r' || p[1] != '\n') {
            if (*p == '\r')
                return bad(head, "bare CR");
            return bad(head, *p == '\n' ? "bare LF" : "control byte in a field value");
        }
        if ((size_t)(p - line) > limits->max_field)
            return over(head, HTTP1_OVER_FIELD, "field line too long");
        const char *value_end = p;
        while (value_end > value && (value_end[-1] == ' ' || value_end[-1] == '\t'))
            value_end--;
        p += 2;

        http1_field *field = &head->fields[head->n_fields++];
        field->name = span(buf, line, name_end);
        field->value = span(buf, value, value_end);
        enum http1_name id = identify(line, (size_t)(name_end - line));
        field->id = (uint8_t)id;
        if (id == HTTP1_OTHER) {
            if (disguised(line, (size_t)(name_end - line)))
                return bad(head, "field name that reads as a framing field");
        } else {
            if (head->count[id]++ == 0)
                head->first[id] = (uint8_t)head->n_fields;
        }
    }
}

/* "HTTP/1.x" at p (8 bytes are there). */
static enum http1_result parse_version(http1_head *head, const char *p)
{
    if (memcmp(p, "HTTP/", 5) != 0 || !is(p[5], DIGIT) || p[6] != '.' || !is(p[7], DIGIT))
        return bad(head, "not an HTTP version");
    if (p[5] != '1' || p[7] > '1')
        return fail(head, HTTP1_BAD_VERSION, "HTTP version is neither 1.0 nor 1.1");
    head->minor = (uint8_t)(p[7] - '0');
    return HTTP1_DONE;
}

/* Advance over bytes of `class` and well-formed percent escapes; stops at end, or where neither is. */
static const char *scan_target(const char *p, const char *end, unsigned class)
{
    for (;;) {
        while (p < end && is(*p, class))
            p++;
        if (p == end || *p != '%')
            return p;
        if ((end - p > 1 && !is(p[1], HEX)) || (end - p > 2 && !is(p[2], HEX)))
            return p;
        if (end - p < 3)
            return end; /* an escape that is cut off: only the rest can tell */
        p += 3;
    }
}

/* The request line at *at, which is moved behind it. */
static enum http1_result parse_request_line(http1_head *head, const char *buf, const char **at, const char *end,
                                            const http1_limits *limits)
{
    const char *line = *at, *p = line;
    while (p < end && is(*p, TOKEN))
        p++;
    if ((size_t)(p - line) > METHOD_MAX)
        return bad(head, "method too long");
    if (p == end)
        return partial(head, line, end, limits->max_line, true);
    if (p == line || *p != ' ')
        return bad(head, "not a method");
    head->method = span(buf, line, p++);

    const char *target = p;
    if (p == end)
        return partial(head, line, end, limits->max_line, true);
    if (*p != '/')
        return bad(head, "target is not a path");
    p = scan_target(p, end, PATH);
    head->path = span(buf, target, p);
    if (p < end && *p == '?') {
        const char *query = ++p;
        p = scan_target(p, end, QUERY);
        head->query = span(buf, query, p);
    }
    if (p == end)
        return partial(head, line, end, limits->max_line, true);
    head->target = span(buf, target, p);
    if (*p != ' ') {
        if (*p == '#')
            return bad(head, "fragment in the target");
        return bad(head, *p == '\r' || *p == '\n' ? "no HTTP version" : "byte that may not be in a target");
    }
    p++;
    if (end - p < 10) {
        if (p < end && *p != 'H')
            return bad(head, "not an HTTP version");
        const char *stop = control(p, end);
        if (stop < end && (*stop != '\r' || (end - stop > 1 && stop[1] != '\n') || stop - p != 8))
            return bad(head, "bad end of the request line");
        return partial(head, line, end, limits->max_line, true);
    }
    if (p[8] != '\r' || p[9] != '\n')
        return bad(head, "bad end of the request line");
    if ((size_t)(p + 8 - line) > limits->max_line)
        return over(head, HTTP1_OVER_LINE, "request line too long");
    *at = p + 10;
    return parse_version(head, p);
}

/* The status line at *at, which is moved behind it. The reason phrase may be missing with its space. */
static enum http1_result parse_status_line(http1_head *head, const char **at, const char *end,
                                           const http1_limits *limits)
{
    const char *line = *at, *p = line;
    size_t n = (size_t)(end - line) < 5 ? (size_t)(end - line) : 5;
    if (memcmp(line, "HTTP/", n) != 0)
        return bad(head, "not an HTTP version");
    p = control(line, end);
    if (p < end && *p != '\r')
        return bad(head, *p == '\n' ? "bare LF" : "control byte in the status line");
    if (end - p < 2)
        return partial(head, line, end, limits->max_line, true);
    if (p[1] != '\n')
        return bad(head, "bare CR");
    if ((size_t)(p - line) > limits->max_line)
        return over(head, HTTP1_OVER_LINE, "status line too long");
    if (p - line < 12)
        return bad(head, "status line too short");
    if (parse_version(head, line) != HTTP1_DONE)
        return HTTP1_ERROR;
    if (line[8] != ' ' || !is(line[9], DIGIT) || !is(line[10], DIGIT) || !is(line[11], DIGIT) || line[9] == '0')
        return bad(head, "not a status code");
    if (p - line > 12 && line[12] != ' ')
        return bad(head, "not a status code");
    head->status = (uint16_t)((line[9] - '0') * 100 + (line[10] - '0') * 10 + (line[11] - '0'));
    *at = p + 2;
    return HTTP1_DONE;
}

/* ---- meaning ----------------------------------------------------------------------------------------------------- */

/* Connection options of all Connection fields (RFC 9110 7.6.1). */
static void parse_connection(const http1_head *head, const char *buf, bool *close, bool *keep_alive)
{
    for (uint32_t i = head->first[HTTP1_CONNECTION] - 1u; i < head->n_fields; i++) {
        if (head->fields[i].id != HTTP1_CONNECTION)
            continue;
        const char *p = buf + head->fields[i].value.off, *end = p + head->fields[i].value.len;
        while (p < end) {
            const char *option = p;
            while (p < end && *p != ',')
                p++;
            const char *stop = p;
            while (option < stop && (*option == ' ' || *option == '\t'))
                option++;
            while (stop > option && (stop[-1] == ' ' || stop[-1] == '\t'))
                stop--;
            *close |= http1_name_is(option, (size_t)(stop - option), "close", 5);
            *keep_alive |= http1_name_is(option, (size_t)(stop - option), "keep-alive", 10);
            p++; /* the comma; one past the end after the last option */
        }
    }
}

static bool parse_length(const char *p, size_t len, uint64_t *value)
{
    if (len == 0 || len > CONTENT_LENGTH_DIGITS)
        return false;
    uint64_t n = 0; /* 19 digits fit 64 bits */
    for (size_t i = 0; i < len; i++) {
        if (!is(p[i], DIGIT))
            return false;
        n = n * 10 + (unsigned)(p[i] - '0');
    }
    *value = n;
    return n <= INT64_MAX;
}

/* What both kinds of heads say about framing and persistence (RFC 9112 6.3, 9.3). */
static enum http1_result judge(http1_head *head, const char *buf)
{
    bool close = false, keep_alive = false;
    head->framing = HTTP1_NO_BODY;
    if (head->count[HTTP1_CONTENT_LENGTH]) {
        asc_span value = http1_value(head, HTTP1_CONTENT_LENGTH);
        if (head->count[HTTP1_CONTENT_LENGTH] > 1)
            return bad(head, "more than one Content-Length");
        if (head->count[HTTP1_TRANSFER_ENCODING])
            return bad(head, "Content-Length together with Transfer-Encoding");
        if (!parse_length(buf + value.off, value.len, &head->content_length))
            return bad(head, "Content-Length is not a number");
        head->framing = HTTP1_LENGTH;
    }
    if (head->count[HTTP1_TRANSFER_ENCODING]) {
        asc_span value = http1_value(head, HTTP1_TRANSFER_ENCODING);
        if (head->count[HTTP1_TRANSFER_ENCODING] > 1 || !http1_name_is(buf + value.off, value.len, "chunked", 7))
            return fail(head, HTTP1_UNSUPPORTED_TE, "Transfer-Encoding is not exactly chunked");
        if (head->minor == 0)
            return bad(head, "Transfer-Encoding on HTTP/1.0");
        head->framing = HTTP1_CHUNKED;
    }
    if (head->count[HTTP1_CONNECTION])
        parse_connection(head, buf, &close, &keep_alive);
    head->keep_alive = !close && (head->minor == 1 || keep_alive);
    head->upgrade = head->count[HTTP1_UPGRADE] != 0;
    return HTTP1_DONE;
}

/* host[:port] with a DNS name, an IPv4 address or a bracketed IPv6 address. */
static bool is_host(const char *p, size_t len)
{
    const char *end = p + len, *start = p;
    if (p < end && *p == '[') {
        bool colon = false;
        for (p++; p < end && (is(*p, HEX) || *p == ':' || *p == '.'); p++)
            colon |= *p == ':';
        if (!colon || p == end || *p++ != ']')
            return false;
    } else {
        while (p < end && is(*p, HOST))
            p++;
    }
    if (p == start)
        return false;
    if (p == end)
        return true;
    if (*p++ != ':' || p == end || end - p > 5)
        return false;
    unsigned port = 0;
    for (; p < end; p++) {
        if (!is(*p, DIGIT))
            return false;
        port = port * 10 + (unsigned)(*p - '0');
    }
    return port <= 65535;
}

static bool takes_no_body(const char *buf, asc_span method)
{
    const char *name = buf + method.off;
    return (method.len == 3 && memcmp(name, "GET", 3) == 0) || (method.len == 4 && memcmp(name, "HEAD", 4) == 0);
}

static enum http1_result judge_request(http1_head *head, const char *buf)
{
    asc_span host = http1_value(head, HTTP1_HOST);
    if (head->count[HTTP1_HOST] != 1) {
        if (head->count[HTTP1_HOST] > 1 || head->minor == 1)
            return bad(head, head->count[HTTP1_HOST] ? "more than one Host" : "no Host");
    } else if (!is_host(buf + host.off, host.len)) {
        return bad(head, "Host is not host[:port]");
    }
    if (head->count[HTTP1_EXPECT]) {
        asc_span expect = http1_value(head, HTTP1_EXPECT);
        if (head->count[HTTP1_EXPECT] > 1 || !http1_name_is(buf + expect.off, expect.len, "100-continue", 12))
            return bad(head, "unknown expectation");
        head->expect_continue = head->minor == 1; /* RFC 9110 10.1.1: ignored from an HTTP/1.0 client */
    }
    if (judge(head, buf) != HTTP1_DONE)
        return HTTP1_ERROR;
    /* RFC 9110 9.3.1: such content has no meaning and is what request smuggling hides in */
    if ((head->framing == HTTP1_CHUNKED || head->content_length > 0) && takes_no_body(buf, head->method))
        return bad(head, "GET or HEAD with a body");
    return HTTP1_DONE;
}

static enum http1_result judge_response(http1_head *head, const char *buf, bool head_request)
{
    if (judge(head, buf) != HTTP1_DONE)
        return HTTP1_ERROR;
    if (head_request || head->status < 200 || head->status == 204 || head->status == 304) {
        head->framing = HTTP1_NO_BODY;
    } else if (head->framing == HTTP1_NO_BODY) {
        head->framing = HTTP1_TO_CLOSE;
        head->keep_alive = false;
    }
    return HTTP1_DONE;
}

/* ---- entry ------------------------------------------------------------------------------------------------------- */

/* Nothing but bytes within a line arrived since the last call. Says DONE when the head must be parsed, because a line
 * ended (or is damaged, which the parse then names). */
static enum http1_result still_partial(http1_head *head, const char *buf, size_t len, size_t seen,
                                       const http1_limits *limits)
{
    const char *end = buf + len, *stop = control(buf + seen - 1, end); /* the last byte seen may be a CR */
    if (stop < end && !(*stop == '\r' && stop + 1 == end))
        return HTTP1_DONE;
    if (len / LIMIT_STRIDE == seen / LIMIT_STRIDE)
        return HTTP1_PARTIAL;
    const char *line = memrchr(buf, '\n', len);
    if (line && line - buf > 1)
        return partial(head, line + 1, end, limits->max_field, false);
    return partial(head, line ? line + 1 : buf, end, limits->max_line, true);
}

static enum http1_result parse(http1_head *head, const char *buf, size_t len, size_t seen, bool request,
                               bool head_request, const http1_limits *limits)
{
    memset(head, 0, offsetof(http1_head, fields));
    bool all = len < limits->max_head;
    if (!all)
        len = limits->max_head; /* so that offsets fit 32 bits, and nothing behind the limit is looked at */
    const char *p = buf, *end = buf + len;
    enum http1_result result = HTTP1_DONE;
    if (seen > 0 && seen <= len)
        result = still_partial(head, buf, len, seen, limits);
    else if (len == 0)
        result = HTTP1_PARTIAL;
    if (result == HTTP1_DONE && request && *p == '\r') { /* one empty line (RFC 9112 2.2) */
        if (len == 1)
            result = HTTP1_PARTIAL;
        else if (p[1] != '\n')
            result = bad(head, "bare CR");
        else if (len == 2)
            result = HTTP1_PARTIAL;
        p += 2;
    }
    if (result == HTTP1_DONE)
        result = request ? parse_request_line(head, buf, &p, end, limits) : parse_status_line(head, &p, end, limits);
    if (result == HTTP1_DONE)
        result = parse_fields(head, buf, p, end, limits);
    if (result == HTTP1_DONE)
        return request ? judge_request(head, buf) : judge_response(head, buf, head_request);
    if (result == HTTP1_PARTIAL && !all)
        return over(head, HTTP1_OVER_HEAD, "head too large");
    return result;
}

enum http1_result http1_parse_request(http1_head *head, const char *buf, size_t len, size_t seen,
                                      const http1_limits *limits)
{
    return parse(head, buf, len, seen, true, false, limits);
}

enum http1_result http1_parse_response(http1_head *head, const char *buf, size_t len, size_t seen, bool head_request,
                                       const http1_limits *limits)
{
    return parse(head, buf, len, seen, false, head_request, limits);
}
