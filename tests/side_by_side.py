# SPDX-License-Identifier: MIT
"""Two processes run a long selection of tests, module by module: pytest's own, and a fork that reports to it."""
import contextlib
import itertools
import multiprocessing
import os
import pickle
import tempfile

import pytest
import torch

LONG = 500  # tests; fewer are left to pytest's own loop
FORK = multiprocessing.get_context("fork")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    options = session.config.option
    alone = os.cpu_count() == 1 or torch.cuda.is_available()  # CUDA does not work in a fork
    if alone or len(session.items) < LONG or session.testsfailed or options.collectonly or options.usepdb:
        return None
    modules = [list(items) for _, items in itertools.groupby(session.items, lambda item: item.module)]
    modules.reverse()  # test_train, the longest, is not the last to begin
    taken = FORK.Value("i", 0)
    with tempfile.TemporaryFile() as reports:
        other = FORK.Process(target=run_beside, args=(session, modules, taken, reports))
        other.start()
        try:
            run_modules(session, modules, taken)
            other.join()
        finally:
            other.kill()
        if other.exitcode != 0:
            session.shouldfail = f"the second process of the tests ended with status {other.exitcode}"  # is printed
            raise session.Failed(session.shouldfail)
        reports.seek(0)
        for data in pickle.load(reports):
            report = session.config.hook.pytest_report_from_serializable(config=session.config, data=data)
            session.config.hook.pytest_runtest_logreport(report=report)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
    return True


def run_modules(session, modules, taken):
    """Runs modules that nobody has taken, one after the other; taken: their number, shared by both processes."""
    while True:
        with taken.get_lock():
            index = taken.value
            taken.value += 1
        if index >= len(modules):
            return
        items = modules[index]
        later = modules[-1][0] if items is not modules[-1] else None  # keeps what all tests share
        for item, following in zip(items, [*items[1:], later]):
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail or session.shouldstop:
                taken.value = len(modules)  # the other process begins none either
                raise session.Failed(session.shouldfail or session.shouldstop)


def run_beside(session, modules, taken, file):
    """In the fork: nothing is printed, captured output goes to files of its own, and all reports end in `file`."""
    hook, plugins = session.config.hook, session.config.pluginmanager
    plugins.unregister(name="terminalreporter")
    capture = plugins.getplugin("capturemanager")
    capture.stop_global_capturing()
    capture.start_global_capturing()
    reports = []

    class Collector:
        @staticmethod
        def pytest_runtest_logreport(report):
            reports.append(hook.pytest_report_to_serializable(config=session.config, report=report))

    plugins.register(Collector)
    with contextlib.suppress(session.Failed):  # what failed is among the reports
        run_modules(session, modules, taken)
    pickle.dump(reports, file)
    file.flush()
