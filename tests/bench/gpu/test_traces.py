"""What is read from a trace, on traces made by hand."""

from bench.gpu.traces import Seen, look


def kernel(number, stream, begin, length=10):
    return {
        "ph": "X",
        "cat": "kernel",
        "name": "k",
        "ts": begin,
        "dur": length,
        "args": {"stream": stream, "correlation": number},
    }


def call(number, thread, begin, name="cudaLaunchKernel"):
    args = {} if number is None else {"correlation": number}
    return {"ph": "X", "cat": "cuda_runtime", "name": name, "ts": begin, "dur": 1, "tid": thread, "args": args}


def step(order):
    """Launches one after another: backward's by thread 1 on stream 7, the hook's by thread 2 on stream 20."""
    events = []
    for number, who in enumerate(order):
        thread, stream = {"b": (1, 7), "h": (2, 20)}[who]
        events += [call(number, thread, 10 * number), kernel(number, stream, 10 * number + 5, 12)]
    return events


def test_kernels_that_take_turns():
    seen = look(step("bbhbhbhb"))
    assert seen == Seen(backward=5, ours=3, meanwhile=2, at_once=seen.at_once, waits_of_backward=0, waits=0)
    assert seen.at_once > 0


def test_a_hook_that_holds_backward_up():
    assert look(step("bbbbhhh")).meanwhile == 0


def test_who_waits():
    events = step("bbhbhb")
    waits = [call(None, 1, 35, "cudaStreamSynchronize"), call(None, 2, 45, "cudaStreamSynchronize")]
    late = [call(None, 1, 900, "cudaDeviceSynchronize")]  # the profiler's own, when all is over
    seen = look([*events, *waits])
    assert (seen.waits_of_backward, seen.waits) == (0, 1)
    seen = look([*events, call(None, 1, 25, "cudaStreamSynchronize"), *late])
    assert (seen.waits_of_backward, seen.waits) == (1, 0)


def test_one_stream():
    """As without a lane of our own: nothing is side by side."""
    events = [e for number in range(3) for e in (call(number, 1, number), kernel(number, 7, number))]
    assert look(events).meanwhile == 0
