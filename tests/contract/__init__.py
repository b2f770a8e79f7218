"""What every public callback promises, tested once for all of them.

One entry in :mod:`tests.contract.registry` takes a callback through all cells; a public callback without one fails a
test. What is refused by design is refused in words that a cell asserts. ``python -m tests.contract`` prints counts.

====================  ================================================================================================
``test_lifecycle``    fits in a row, a Trainer used twice, errors in an epoch, copies, both packages, single callbacks
``test_silence``      nothing found: the same weights, logs, rates and random streams; until it acts: the same weights
``test_resume``       checkpoints from every epoch, its middle and its validation; other data; with and without callback
``test_settings``     precision, accumulation, clipping, limits, averages, early stopping, schedules, finders
``test_outside``      command lines by flag and YAML, loggers, progress bars, reports, two instances by name
``test_composition``  two and more defences on one Trainer, in both orders
``test_bad_input``    images that cannot be read or are not finite, datasets that shrink, labels of another kind
``test_faults``       other answers of a model, full disks, hostile names
``test_processes``    several processes: one verdict, one model, and an error in one of them
``test_killed``       processes that are killed in a look, in the nested stage, in a report: what resumes, what is whole
``test_fuzz``         samplers under any mask, size, world and epoch; looks that follow each other
====================  ================================================================================================
"""
