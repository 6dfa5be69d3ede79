/* Deadlines of a worker's connections: a hashed wheel of 100 ms slots, driven by the tick (DESIGN 5).
 *
 * A timer is part of its owner, so setting one allocates nothing. Moving a deadline later only writes a number: the timer is
 * found at its old slot and put where it belongs. Resolution is one slot; a deadline never fires early.
 */
#ifndef ASC_WHEEL_H
#define ASC_WHEEL_H

#include <stdbool.h>
#include <stdint.h>

#define WHEEL_SLOTS 1024u            /* 102 s ahead; later deadlines are looked at again then */
#define WHEEL_SLOT_NS 100000000ull

typedef struct wheel_timer {
    struct wheel_timer *next, *prev; /* both NULL when not in the wheel */
    uint64_t deadline_ns;            /* 0: none */
    uint64_t slot;                   /* absolute slot number it lies in */
    void *owner;
} wheel_timer;

typedef struct {
    wheel_timer heads[WHEEL_SLOTS];  /* sentinels of circular lists */
    uint64_t slot;                   /* all slots before this one have been looked at */
} wheel;

void wheel_init(wheel *w, uint64_t now_ns);
/* Fire at or after deadline_ns; 0 takes the timer out. */
void wheel_set(wheel *w, wheel_timer *timer, uint64_t deadline_ns);
/* The next timer that is due at now_ns, taken out, or NULL when there is none. The caller may set and clear any timer between calls. */
wheel_timer *wheel_due(wheel *w, uint64_t now_ns);

#endif
