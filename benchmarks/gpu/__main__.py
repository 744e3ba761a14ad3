"""See the package."""

from benchmarks.gpu.command_line import main

main()
