/* X-Forwarded-For: a list of addresses, to which each proxy appends the one that it was connected from. Only the elements
 * at its end, which proxies of ours wrote, say anything; so it is read from there.
 *
 * There is no standard. Elements are IPv4 or IPv6 addresses, with a port where some load balancers add one (1.2.3.4:80,
 * [2001:db8::1]:80), or words such as "unknown". */
#ifndef ASC_FORWARDED_H
#define ASC_FORWARDED_H

#include <stddef.h>
#include <stdint.h>

#define FORWARDED_TEXT 46u /* INET6_ADDRSTRLEN */

enum forwarded_result { FORWARDED_END, FORWARDED_ADDRESS, FORWARDED_OTHER };

/* Take the last element that is not empty off value[0..*len): FORWARDED_ADDRESS with the address (IPv4 as ::ffff:a.b.c.d),
 * FORWARDED_OTHER for what is none, FORWARDED_END when no element is left. */
enum forwarded_result forwarded_last(const char *value, size_t *len, uint8_t address[16]);

/* The address as text, NUL-terminated. */
void forwarded_text(const uint8_t address[16], char text[FORWARDED_TEXT]);

#endif
