"""Find the products of any JAX program that read a leaf of its params, and the other operand of each.

`origin` says which axis of a value is which axis of a leaf, and `operations` what each layout operation does to that.
`products` finds the roles of a kernel's axes and the rows of its input. `devices` says what differs between the devices
of a `shard_map`. `walk` runs a program operation by operation. `program` is what the rest of the package uses.
"""
