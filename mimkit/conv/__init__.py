"""Depth-wise convolution of the visible positions."""

from mimkit.conv._depthwise import masked_depthwise_conv2d, packed_depthwise_conv2d

__all__ = ["masked_depthwise_conv2d", "packed_depthwise_conv2d"]
