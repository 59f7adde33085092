"""Train LoRA under the mask: losses, step, loop, checkpoints, teacher."""
