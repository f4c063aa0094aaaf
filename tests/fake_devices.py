"""Two GPUs that are none: a model whose blocks are spread over them, and an error wherever tensors of two of them meet

Everything is computed on the CPU. A mode that sees each call of torch gives every tensor a tag, the device that it would be on; `.device`
says the tag, `.to` changes it, and a call that mixes two tags fails as it does on real ones. Tensors that torch makes without being called
from Python (gradients) have no tag and fit everywhere.
"""
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

CPU = torch.device("cpu")
DEVICE = torch.Tensor.device.__get__
MOVES = {torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu}
FREE = {torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.copy_, torch.Tensor.index_put, torch.Tensor.index_put_, torch.Tensor.backward, torch.Tensor.__deepcopy__, torch.autograd.grad, torch.autograd.backward}
# these take tensors of several devices, and sort them out themselves; so does all that begins with _foreach


def fake(device): return device is not None and torch.device(device).type == "cuda"


class TwoDevices(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == DEVICE: return getattr(args[0], "_tag", None) or CPU
        if getattr(func, "__name__", "") in ("__get__", "__set__"): return self.property(func, args, kwargs)
        if func in MOVES: return self.move(func, args, kwargs)
        wanted = kwargs.pop("device", None)
        tags = self.tags(args, kwargs)
        if len(tags) > 1 and func not in FREE and not getattr(func, "__name__", "").startswith("_foreach"):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {sorted(map(str, tags))}, in {getattr(func, '__name__', func)}")
        if wanted is not None and not fake(wanted): kwargs["device"] = wanted
        out = func(*args, **kwargs)
        if getattr(func, "__name__", "").startswith("_foreach"): return out # each tensor stays where it is
        first = next((x for x in tree_flatten(args)[0] if isinstance(x, torch.Tensor)), None)
        tag = torch.device(wanted) if wanted is not None else getattr(first, "_tag", None) if func in FREE else next(iter(tags), None)
        return self.tagged(out, tag)

    def tags(self, args, kwargs):
        "Devices of all tensors, but for single numbers on the CPU, which may be anywhere"
        found = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        tags = {x._tag for x in found if getattr(x, "_tag", None)}
        return tags

    def tagged(self, out, tag):
        def one(x):
            if tag is not None and not (tag == CPU and not hasattr(x, "_tag")): x._tag = tag
            return x
        return tree_map_only(torch.Tensor, one, out) if tag is not None else out

    def property(self, func, args, kwargs):
        out = func(*args, **kwargs)
        tag = getattr(args[0], "_tag", None) if args and isinstance(args[0], torch.Tensor) else None
        return self.tagged(out, tag) if isinstance(out, torch.Tensor) else out

    def move(self, func, args, kwargs):
        x, *rest = args
        if func is torch.Tensor.cpu: target = CPU
        elif func is torch.Tensor.cuda: target = torch.device("cuda:0")
        else:
            named = [r for r in [*rest, kwargs.get("device")] if isinstance(r, (str, torch.device)) or (isinstance(r, int) and not isinstance(r, bool))]
            like = [r for r in rest if isinstance(r, torch.Tensor)]
            target = torch.device("cuda", named[0]) if named and isinstance(named[0], int) else torch.device(named[0]) if named else (getattr(like[0], "_tag", CPU) if like else None)
            rest = [r for r in rest if r is not None and not isinstance(r, bool) and not any(r is n for n in named)]
            kwargs.pop("device", None)
        with torch._C.DisableTorchFunction():
            out = x.to(*rest, **kwargs) if func is torch.Tensor.to and (rest or kwargs) else x
            if target is None: target = getattr(x, "_tag", None)
            elif target != (getattr(x, "_tag", None) or CPU) and out is x: out = x.view_as(x)
        if target is not None: out._tag = target
        return out


def spread(lm):
    "Put the first half of a model's blocks, with the embedding, on one fake GPU, and the rest on another"
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    blocks = next(m for m in lm.hf.modules() if isinstance(m, torch.nn.ModuleList))
    where = {id(p): second for b in blocks[len(blocks)//2:] for p in [*b.parameters(), *b.buffers()]}
    late = [m for m in lm.hf.modules() if m is not lm.hf and not list(m.children())]
    for p in [*lm.hf.parameters(), *lm.hf.buffers()]: p._tag = where.get(id(p), first)

    def bring(device):
        def hook(module, args, kwargs):
            sent = tree_map_only(torch.Tensor, lambda x: x.to(device), (args, kwargs))
            return sent
        return hook
    for k, b in enumerate(blocks): b.register_forward_pre_hook(bring(second if k >= len(blocks)//2 else first), with_kwargs=True)
    for name, m in lm.hf.named_modules():
        if name.endswith(("norm", "lm_head")) and not any(m in set(b.modules()) for b in blocks): m.register_forward_pre_hook(bring(first), with_kwargs=True)
    return lm
