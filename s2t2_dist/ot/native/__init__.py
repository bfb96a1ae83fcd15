"""The passes of the sparse solvers in C++, for a CPU: `library` compiles and calls them."""
