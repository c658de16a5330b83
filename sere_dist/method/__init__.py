"""The method: tensors in, tensors out. These modules import torch alone; read them beside the paper."""
