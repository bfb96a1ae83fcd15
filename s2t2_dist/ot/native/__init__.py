"""C++ for a CPU: `library` compiles and calls native.cpp; `passes` sweeps the rows with it."""
