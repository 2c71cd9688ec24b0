"""A step of the real code on tensors that have shapes and no contents, as any rank of any world, without a GPU."""
