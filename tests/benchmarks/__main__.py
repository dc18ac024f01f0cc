"""`python -m tests.benchmarks`: all comparisons, or `gpu`, which needs few packages."""

import sys

if sys.argv[1:2] == ["gpu"]:
    from tests.benchmarks.gpu import main as gpu

    gpu(sys.argv[2:])
else:
    from tests.benchmarks.comparisons import main

    main()
