/* Elements of X-Forwarded-For. See forwarded.h. */
#include "forwarded.h"

#include <arpa/inet.h>
#include <stdbool.h>
#include <string.h>

static const uint8_t mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

static bool blank(char c)
{
    return c == ' ' || c == '\t';
}

/* ":" and 1 to 5 digits, or nothing. */
static bool port(const char *text, size_t len)
{
    if (len == 0)
        return true;
    if (text[0] != ':' || len < 2 || len > 6)
        return false;
    for (size_t i = 1; i < len; i++)
        if (text[i] < '0' || text[i] > '9')
            return false;
    return true;
}

static bool address_of(const char *text, size_t len, uint8_t address[16])
{
    char copy[FORWARDED_TEXT];
    size_t host = len;
    if (memchr(text, 0, len) != NULL)
        return false;
    if (text[0] == '[') {
        const char *end = memchr(text, ']', len);
        if (end == NULL || !port(end + 1, len - (size_t)(end + 1 - text)))
            return false;
        text++;
        host = (size_t)(end - text);
    } else {
        const char *colon = memchr(text, ':', len);
        size_t before = colon == NULL ? len : (size_t)(colon - text);
        if (colon != NULL && memchr(colon + 1, ':', len - before - 1) == NULL) { /* one colon: IPv4 and a port */
            if (!port(colon, len - before))
                return false;
            host = before;
        }
    }
    if (host == 0 || host >= sizeof copy)
        return false;
    memcpy(copy, text, host);
    copy[host] = 0;
    if (inet_pton(AF_INET6, copy, address) == 1)
        return true;
    memcpy(address, mapped, sizeof mapped);
    return inet_pton(AF_INET, copy, address + 12) == 1;
}

enum forwarded_result forwarded_last(const char *value, size_t *len, uint8_t address[16])
{
    while (*len) {
        size_t end = *len, begin = end;
        while (begin && value[begin - 1] != ',')
            begin--;
        *len = begin ? begin - 1 : 0;
        while (end > begin && blank(value[end - 1]))
            end--;
        while (begin < end && blank(value[begin]))
            begin++;
        if (begin < end)
            return address_of(value + begin, end - begin, address) ? FORWARDED_ADDRESS : FORWARDED_OTHER;
    }
    return FORWARDED_END;
}

void forwarded_text(const uint8_t address[16], char text[FORWARDED_TEXT])
{
    bool v4 = memcmp(address, mapped, sizeof mapped) == 0;
    inet_ntop(v4 ? AF_INET : AF_INET6, v4 ? address + 12 : address, text, FORWARDED_TEXT);
}
