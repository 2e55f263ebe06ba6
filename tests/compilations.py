"""Count what JAX compiles."""

from contextlib import contextmanager

import jax

_COMPILATION = "/jax/core/compile/backend_compile_duration"


@contextmanager
def counted():
    """Yield a list that gets an item for each compilation within the context."""
    compilations = []

    def listen(event, duration, **_):
        if event == _COMPILATION:
            compilations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
