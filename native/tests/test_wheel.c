/* units: wheel.c */
/* The deadline wheel: never early, found at its time however it was moved. */
#include "../wheel.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>

#define MS 1000000ull

static unsigned long long state = 88172645463325252ull;

static unsigned long long next_random(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static void fires_in_its_slot(void)
{
    static wheel w;
    wheel_timer t = {0};
    wheel_init(&w, 5000 * MS);
    wheel_set(&w, &t, 5250 * MS);
    assert(wheel_due(&w, 5200 * MS) == NULL);
    assert(wheel_due(&w, 5249 * MS) == NULL);
    assert(wheel_due(&w, 5300 * MS) == &t);
    assert(wheel_due(&w, 9000 * MS) == NULL);
}

static void later_earlier_and_cleared(void)
{
    static wheel w;
    wheel_timer t = {0};
    wheel_init(&w, 0);
    wheel_set(&w, &t, 1000 * MS);
    wheel_set(&w, &t, 3000 * MS); /* later: only a number is written */
    assert(wheel_due(&w, 2000 * MS) == NULL);
    wheel_set(&w, &t, 2500 * MS); /* earlier than where it lies now */
    assert(wheel_due(&w, 2600 * MS) == &t);
    wheel_set(&w, &t, 2700 * MS);
    wheel_set(&w, &t, 0);
    assert(wheel_due(&w, 100000 * MS) == NULL);
    assert(t.next == NULL && t.prev == NULL);
}

static void beyond_the_horizon(void)
{
    static wheel w;
    wheel_timer t = {0};
    wheel_init(&w, 0);
    wheel_set(&w, &t, 3600000 * MS);
    for (unsigned long long now = 0; now < 3600000; now += 50000)
        assert(wheel_due(&w, now * MS) == NULL);
    assert(wheel_due(&w, 3600100 * MS) == &t);
}

static void a_stalled_loop_finds_everything(void)
{
    static wheel w;
    wheel_timer t[50] = {0};
    wheel_init(&w, 0);
    for (int i = 0; i < 50; i++)
        wheel_set(&w, &t[i], (unsigned long long)(i + 1) * 1000 * MS);
    int found = 0;
    while (wheel_due(&w, 10000000 * MS) != NULL)
        found++;
    assert(found == 50);
}

static void agrees_with_a_list(void)
{
    enum { N = 200 };
    static wheel w;
    static wheel_timer t[N];
    unsigned long long due[N] = {0}, now = 777;
    wheel_init(&w, now * MS);
    for (int step = 0; step < 20000; step++) {
        int i = (int)(next_random() % N);
        unsigned long long kind = next_random() % 10;
        due[i] = kind == 0 ? 0 : now + next_random() % (kind < 8 ? 5000 : 300000);
        wheel_set(&w, &t[i], due[i] * MS);
        now += next_random() % 40;
        wheel_timer *found;
        while ((found = wheel_due(&w, now * MS)) != NULL) {
            long k = found - t;
            assert(due[k] != 0 && due[k] <= now);
            due[k] = 0;
        }
        for (int k = 0; k < N; k++)
            assert(due[k] == 0 || due[k] + 100 > now); /* nothing is later than one slot */
    }
}

int main(void)
{
    fires_in_its_slot();
    later_earlier_and_cleared();
    beyond_the_horizon();
    a_stalled_loop_finds_everything();
    agrees_with_a_list();
    puts("wheel: 5 passed");
    return 0;
}
