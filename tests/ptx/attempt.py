"""A trial on the machine, and what came of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from accuracy import check_case

from ptx.call import emulated
from ptx.findings import Fault
from ptx.operands import Unsupported
from ptx.trials import Trial, in_package
from vitkernels.dispatch import BackendError


@dataclass
class Outcome:
    """What came of a trial: empty `faults` where it passed."""

    faults: list[str] = field(default_factory=list)
    launches: int = 0
    seconds: float = 0.0


def attempt(trial: Trial) -> Outcome:
    """Run a trial."""
    begin, outcome = time.perf_counter(), Outcome()
    with trial.launching(emulated) as made:
        try:
            check_case(trial.case, trial.dtype, in_package(trial.backend))
        except AssertionError as error:
            outcome.faults.append(f"numbers: {error}")
        except Fault as error:
            outcome.faults.append(str(error))
        except Unsupported as error:
            outcome.faults.append(f"not supported: {error}")
        except BackendError as error:
            outcome.faults.append(f"declined: {error}")
    outcome.faults += [str(finding) for finding in made.findings]
    outcome.launches, outcome.seconds = len(made.launches), time.perf_counter() - begin
    return outcome
