"""The number of threads of the runs in tests."""

import torch


class single_thread:
    """Use one thread, as the child processes do: the number of threads changes rounding."""

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *exception: object) -> None:
        torch.set_num_threads(self.before)
