#include "wheel.h"

#include <stddef.h>

static void unlink_timer(wheel_timer *t)
{
    t->prev->next = t->next;
    t->next->prev = t->prev;
    t->next = t->prev = NULL;
}

static void link_timer(wheel *w, wheel_timer *t)
{
    uint64_t slot = t->deadline_ns / WHEEL_SLOT_NS + 1; /* the first slot that ends after it: never early */
    if (slot < w->slot)
        slot = w->slot;
    if (slot >= w->slot + WHEEL_SLOTS)
        slot = w->slot + WHEEL_SLOTS - 1;
    wheel_timer *head = &w->heads[slot % WHEEL_SLOTS];
    t->slot = slot;
    t->next = head;
    t->prev = head->prev;
    head->prev->next = t;
    head->prev = t;
}

void wheel_init(wheel *w, uint64_t now_ns)
{
    w->slot = now_ns / WHEEL_SLOT_NS;
    for (unsigned i = 0; i < WHEEL_SLOTS; i++) {
        w->heads[i].next = w->heads[i].prev = &w->heads[i];
        w->heads[i].deadline_ns = 0;
    }
}

void wheel_set(wheel *w, wheel_timer *t, uint64_t deadline_ns)
{
    t->deadline_ns = deadline_ns;
    if (deadline_ns == 0) {
        if (t->next != NULL)
            unlink_timer(t);
        return;
    }
    if (t->next != NULL) {
        if (deadline_ns / WHEEL_SLOT_NS + 1 >= t->slot)
            return; /* found at its slot, and moved then */
        unlink_timer(t);
    }
    link_timer(w, t);
}

wheel_timer *wheel_due(wheel *w, uint64_t now_ns)
{
    uint64_t now = now_ns / WHEEL_SLOT_NS;
    if (now > w->slot + WHEEL_SLOTS) /* a stalled loop: one turn visits every slot */
        w->slot = now - WHEEL_SLOTS;
    for (; w->slot <= now; w->slot++) {
        wheel_timer *head = &w->heads[w->slot % WHEEL_SLOTS];
        wheel_timer *t = head->next;
        while (t != head) {
            wheel_timer *next = t->next;
            if (t->slot <= w->slot) {
                unlink_timer(t);
                if (t->deadline_ns <= now_ns)
                    return t;
                uint64_t here = w->slot;
                w->slot = here + 1; /* not due yet: at least one slot ahead */
                link_timer(w, t);
                w->slot = here;
            }
            t = next;
        }
    }
    if (w->slot == now + 1)
        w->slot = now; /* the current slot is looked at again: it has not ended */
    return NULL;
}
