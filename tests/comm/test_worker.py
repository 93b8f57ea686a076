"""Jobs run in the order in which they were asked for, on one thread."""

import functools
import random
import threading
import time

from distopt.comm.worker import Worker


def test_order_is_kept_whatever_the_jobs_take():
    worker, seen, threads = Worker("test"), [], set()
    generator = random.Random(0)

    def job(i, pause):
        time.sleep(pause)
        seen.append(i)
        threads.add(threading.current_thread().name)

    for i in range(50):
        worker.submit(functools.partial(job, i, generator.random() / 500))
    worker.drain()
    assert seen == list(range(50))
    assert threads == {"test"}


def test_no_thread_before_the_first_job():
    before = threading.active_count()
    Worker("idle").drain()
    assert threading.active_count() == before
