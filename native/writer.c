#include "writer.h"

void put_json(asc_writer *w, const char *bytes, size_t len)
{
    static const char hex[] = "0123456789abcdef";
    size_t start = 0;
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)bytes[i];
        if (c >= 0x20 && c < 0x7f && c != '"' && c != '\\')
            continue;
        put(w, bytes + start, i - start);
        start = i + 1;
        if (c == '"' || c == '\\') {
            char pair[2] = {'\\', (char)c};
            put(w, pair, 2);
        } else {
            char escape[6] = {'\\', 'u', '0', '0', hex[c >> 4], hex[c & 15]};
            put(w, escape, 6);
        }
    }
    put(w, bytes + start, len - start);
}
