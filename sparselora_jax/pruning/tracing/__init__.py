"""Find the products of any JAX program that read a leaf of its params, and the other operand of each.

`origin` says which axis of a value is which axis of a leaf, and `operations` what each layout operation does to that.
`products` finds the roles of a kernel's axes and the rows of its input. `program` walks over a traced program.
"""
