"""A pretended GPU, so that a machine without one runs the lines that are meant for one.

`with pretended_gpu() as gpu:` lends `cuda:0`: its tensors say that they are there, and keep their
numbers on the CPU. What a GPU refuses is refused: operands on two devices, and anything from or to
the host while a graph is being recorded. A recording runs nothing that is seen outside it; a replay
runs the same operations on the same memory. What no CPU can show stays unseen: which kernels run,
streams, how much memory, how fast.

Autograd goes its usual way: C++ takes these tensors for CPU tensors without numbers of their own,
so `Devices` has to say where they are, and `Gpu`, below autograd, does what is asked for.
"""
import contextlib
import functools
import os
import sys
import weakref
from collections import Counter
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import flash_by_loops
import sampler
from support import memory, ragged


aten = torch.ops.aten
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
CUDA = torch.device("cuda:0")
INDEXING = (aten.index, aten.index_put, aten.index_put_)
# These take a number that lies on the CPU, as pointwise operations do.
TAKE_NUMBERS = (aten.fill_, aten.masked_fill, aten.masked_fill_, aten.index_put, aten.index_put_)
FLASH = {
    aten._flash_attention_forward.default: flash_by_loops.forward,
    aten._flash_attention_backward.default: flash_by_loops.backward}


class Memory:
    """A storage on the GPU. Alive for as long as a tensor is that lies in it."""


class GpuTensor(torch.Tensor):
    """A tensor that says it is on cuda:0."""
    @staticmethod
    def __new__(cls, numbers, memory):
        # In inference mode, too, a view of a tensor from outside is none of inference mode.
        from_outside = torch.is_inference_mode_enabled() and not numbers.is_inference()
        with torch.inference_mode(False) if from_outside else contextlib.nullcontext():
            self = torch.Tensor._make_wrapper_subclass(
                cls, numbers.shape, strides=numbers.stride(),
                storage_offset=numbers.storage_offset(), dtype=numbers.dtype, device="cpu")
        self.numbers = numbers    # on the CPU
        self.memory = memory
        return self

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self):
        return f"on cuda:0: {self.numbers!r}"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a pretended GPU that is gone")


def for_tensors(f, values):
    """Arguments or results of an operation, with f(tensor) in place of each tensor."""
    changed = []
    for x in values:
        if isinstance(x, torch.Tensor):
            x = f(x)
        elif isinstance(x, (tuple, list)):
            x = for_tensors(f, x)
        changed.append(x)
    return changed


def tensors_in(values):
    found = []
    for x in values:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, (tuple, list)):
            found += tensors_in(x)
    return found


def written(func, args, kwargs):
    """The arguments that an operation changes."""
    found = []
    for i, a in enumerate(func._schema.arguments):
        if a.alias_info is not None and a.alias_info.is_write:
            found.append(args[i] if i < len(args) else kwargs[a.name])
    return found


@functools.cache
def is_look(func):
    """Whether the host needs the result, or its shape."""
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return not tags.isdisjoint(func.tags)


@functools.cache
def is_composite(func):
    """Whether an operation is made of others on all devices."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def storage_of(numbers):
    return numbers.untyped_storage()._cdata


def place():
    """The line of the program, or of its test, that is running."""
    frame = sys._getframe(1)
    while frame:
        path = frame.f_code.co_filename
        if path.startswith(ROOT) and path != __file__ and "site-packages" not in path:
            return f"{os.path.basename(path)}:{frame.f_lineno}"
        frame = frame.f_back
    return "somewhere"


# ---- Graphs --------------------------------------------------------------------------------------

class Graph:
    """torch.cuda.CUDAGraph: operations to run again, on the memory they were recorded with."""
    def __init__(self, gpu):
        self.gpu = gpu
        self.calls = []
        self.born = {}       # storage -> its Memory, weakly, and which operation made it
        self.outside = {}    # the same for storages of before, and which operation needs them

    def add(self, call, operands, born, user):
        """A call, and storages with their Memory: of its operands, and of what it makes."""
        self.calls.append(call)
        for storage, lies_in in operands.items():
            if storage not in self.born:
                self.outside.setdefault(storage, (weakref.ref(lies_in), user))
        for storage, lies_in in born.items():
            self.born[storage] = (weakref.ref(lies_in), user)

    def replay(self):
        if self.gpu.recording:
            raise RuntimeError(f"{place()}: a replay while a graph is being recorded")
        for lies_in, user in self.outside.values():
            if lies_in() is None:
                raise RuntimeError(f"{place()}: a replay needs memory that has moved, for {user}")
        self.gpu.replays += 1
        # Inference mode, because in it tensors may be changed that were born in it or outside.
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.inference_mode():
            for call in self.calls:
                call()


def call_into(results, call):
    for old, new in zip(results, tensors_in([call()]), strict=True):
        old.copy_(new)


# ---- Operations ----------------------------------------------------------------------------------

class Gpu(TorchDispatchMode):
    """Runs each operation that has an operand on the GPU, or is to make one there."""
    def __init__(self):
        super().__init__()
        self.recordings = 0
        self.replays = 0
        self.host_reads = Counter()    # by place: also copies to the GPU, which make it wait, too
        self.escaped = []              # born in a recording, and alive after it
        self.takes_fp32 = False        # flash attention does, for comparisons to the last digit
        self.recording = None          # the Graph
        self.makes = False             # a tensor is to be made here

    @classmethod
    def _should_skip_dynamo(cls):
        return False    # no compiler is meant, and to import it takes seconds

    @contextlib.contextmanager
    def record(self, graph, pool=None, stream=None, capture_error_mode="global"):
        """torch.cuda.graph"""
        self.look("the start of a recording")
        assert not graph.calls, "a graph is recorded once"
        self.recording = graph
        self.recordings += 1
        try:
            yield
        finally:
            self.recording = None
        self.escaped += [user for memory, user in graph.born.values() if memory() is not None]

    def look(self, what):
        """The host waits for the GPU."""
        if self.recording:
            raise RuntimeError(f"{place()}: {what}: not permitted while a graph is being recorded")
        self.host_reads[f"{place()}: {what}"] += 1

    def move(self, x, to_gpu):
        if isinstance(x, GpuTensor) == to_gpu:
            return x
        if x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{place()}: a gradient between two devices")
        self.look("a copy to the GPU" if to_gpu else "a copy to the host")
        return GpuTensor(x.detach().clone(), Memory()) if to_gpu else x.numbers.clone()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # In inference mode operations come whole: take them apart.
        if torch.is_inference_mode_enabled() and is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        strangers = tensors_in(args) + tensors_in(kwargs.values())
        operands = [x for x in strangers if isinstance(x, GpuTensor)]
        # C++ makes zeros for a gradient that is not there, where it believes the tensor to be.
        is_gradient = (func is aten.zeros.default and "device" in kwargs
                       and torch._C._current_graph_task_id() != -1)
        if not operands and not self.makes and not is_gradient:
            return func(*args, **kwargs)
        if operands:
            strangers = [x for x in strangers if not isinstance(x, GpuTensor)]
            self.refuse(func, args, kwargs, strangers)
        return self.run(func, args, kwargs, operands)

    def run(self, func, args, kwargs, operands):
        graph = self.recording

        def numbers(x):
            if isinstance(x, GpuTensor):
                return x.numbers
            return x.clone() if graph else x    # a recording keeps what comes from the host

        args_on_cpu = for_tensors(numbers, args)
        kwargs_on_cpu = dict(zip(kwargs, for_tensors(numbers, kwargs.values())))
        call = functools.partial(FLASH.get(func, func), *args_on_cpu, **kwargs_on_cpu)
        user = f"{func} at {place()}" if graph else ""
        memory_of = {storage_of(x.numbers): x.memory for x in operands}
        if func._schema.is_mutable:
            targets = tensors_in(written(func, args_on_cpu, kwargs_on_cpu))
            if graph:
                graph.add(call, memory_of, {}, user)
            # What was born in this recording is nobody else's: it may have its numbers at once.
            if not graph or all(storage_of(x) in graph.born for x in targets):
                call()
            return written(func, args, kwargs)[0] if func._schema.returns else None

        out = call()
        results = tensors_in([out])
        born = {}
        for x in results:
            if storage_of(x) not in memory_of:
                born[storage_of(x)] = Memory()
        if graph and born:    # a view needs no call
            graph.add(functools.partial(call_into, results, call), memory_of, born, user)
        memory_of.update(born)
        [out] = for_tensors(lambda x: GpuTensor(x, memory_of[storage_of(x)]), [out])
        return out

    def refuse(self, func, args, kwargs, strangers):
        """Raises what a GPU raises; notes where the host waits."""
        packet = func.overloadpacket
        if packet is aten.copy_ and strangers:
            return self.look("a copy between host and GPU")
        if packet in INDEXING:
            indices = tensors_in(args[1])
            fills = packet is not aten.index and args[2].numel() == 1    # PyTorch: masked_fill
            if any(i.dtype == torch.bool for i in indices) and not fills:
                self.look("an index by mask")
            from_host = [i for i in indices if not isinstance(i, GpuTensor)]
            if from_host and isinstance(args[0], GpuTensor):
                self.look("an index from the host")
                strangers = [x for x in strangers if all(x is not i for i in from_host)]
        elif is_look(func):
            self.look(str(packet))
        if strangers and (torch.Tag.pointwise in func.tags or packet in TAKE_NUMBERS):
            targets = tensors_in(written(func, args, kwargs))
            strangers = [x for x in strangers if x.dim() or any(x is target for target in targets)]
        if strangers:
            raise RuntimeError(f"{place()}: {func}: expected all tensors to be on the same device, "
                               "but found at least two devices, cuda:0 and cpu")
        if func in FLASH:
            self.refuse_flash(args, kwargs)

    def refuse_flash(self, args, kwargs):
        dtype = args[1].dtype
        if dtype not in (torch.bfloat16, torch.float16) and not self.takes_fp32:
            raise RuntimeError(f"{place()}: flash attention takes bf16 and fp16, not {dtype}")
        # Its backward would not know how many keys were used.
        if kwargs.get("seqused_k") is not None and torch.is_grad_enabled():
            if any(x.requires_grad for x in args[:3]):
                raise RuntimeError(f"{place()}: flash attention has no gradient with seqused_k")


# ---- Devices -------------------------------------------------------------------------------------

class Devices(TorchFunctionMode):
    """Understands device=, .to, .cpu, .cuda and .tolist, in which C++ would see a CPU tensor."""
    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func is torch.Tensor.backward:
            kwargs["grad_tensors"] = kwargs.pop("gradient", None)
            with self:    # what backward runs is code like any other: hooks, blocks run again
                return torch.autograd.backward(*args, **kwargs)
        if name in ("cpu", "cuda"):
            return self.gpu.move(args[0], name == "cuda")
        if name == "tolist":
            return func(self.gpu.move(args[0], False))
        if name == "to":
            return self.to(func, *args, **kwargs)
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        device = torch.device(kwargs["device"])
        if device.type != "cuda":
            assert device.type == "meta" or not isinstance(args[0], GpuTensor), "not pretended"
            return func(*args, **kwargs)
        kwargs["device"] = "cpu"
        if func in (torch.tensor, torch.as_tensor):
            return self.gpu.move(func(*args, **kwargs), True)
        self.gpu.makes = True
        try:
            return func(*args, **kwargs)
        finally:
            self.gpu.makes = False

    def to(self, func, x, *args, copy=False, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype)
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type == "meta":
            return func(x, *args, copy=copy, **kwargs)
        moved = self.gpu.move(x, device.type == "cuda")
        return func(moved, dtype or x.dtype, copy=copy and moved is x)


in_groups = torch._C._group_tensors_by_device_and_dtype


def group_by_device(lists, with_indices=False):
    """For optimizers and clipping: tensors in groups, by the device that they say they are on."""
    found = {}
    for (_, dtype), (columns, indices) in in_groups(lists, with_indices).items():
        devices = {x.device for x in columns[0]}
        assert len(devices) == 1, "not pretended"
        found[devices.pop(), dtype] = (columns, indices)
    return found


@contextlib.contextmanager
def flash_everywhere():
    with contextlib.ExitStack() as stack:
        for module in (sampler, ragged, memory):
            stack.enter_context(mock.patch.object(
                module, "has_flash", lambda model: model.device.type == "cuda"))
        yield


@contextlib.contextmanager
def pretended_gpu(flash_in_fp32=False):
    """A GPU for as long as the block runs. flash_in_fp32: FlashAttention takes fp32, too, and is
    used in it, so that numbers can be compared to the last digit."""
    gpu = Gpu()
    gpu.takes_fp32 = flash_in_fp32
    cuda = dict(
        graph=gpu.record,
        CUDAGraph=lambda: Graph(gpu),
        graph_pool_handle=object,
        synchronize=lambda device=None: gpu.look("synchronize"),
        mem_get_info=lambda device=None: (2**33, 2**33),
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        get_device_capability=lambda device=None: (9, 0),
        get_device_name=lambda device=None: "a pretended GPU",
        is_bf16_supported=lambda including_emulation=True: True,
        is_current_stream_capturing=lambda: gpu.recording is not None)
    for name in ("reserved", "allocated"):
        cuda[f"memory_{name}"] = cuda[f"max_memory_{name}"] = lambda device=None: 0
    stream = mock.Mock(is_capturing=cuda["is_current_stream_capturing"])
    with (mock.patch.multiple(torch.cuda, **cuda),
          mock.patch.object(torch.accelerator, "current_stream", lambda device=None: stream),
          # Module.to makes new parameters: it could not put these tensors into old ones.
          mock.patch.object(
              torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True),
          mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", group_by_device),
          flash_everywhere() if flash_in_fp32 else contextlib.nullcontext(),
          Devices(gpu), gpu):
        yield gpu
