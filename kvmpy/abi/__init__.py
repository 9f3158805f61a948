"""What the kernel and the guest define: constants, structs and layouts.

Where the kernel owns them, they are taken from the compiler.
"""
