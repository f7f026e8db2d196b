"""What `python3`'s PyTorch is, as one JSON object: {"version", "nccl", "library"}, or {"problem"} where it cannot be measured.

"library" is the file of NCCL that PyTorch has loaded, or null where NCCL is linked into PyTorch itself.
"""

import json


def probe():
    try:
        import torch
        import torch.distributed as dist
    except ImportError as error:
        return {"problem": f"it has no PyTorch ({error})"}
    if not torch.cuda.is_available():
        return {"problem": f"its PyTorch {torch.__version__} sees no GPU"}
    if not dist.is_nccl_available():
        return {"problem": f"its PyTorch {torch.__version__} has no NCCL"}
    with open("/proc/self/maps") as maps:
        files = sorted({line.split()[-1] for line in maps if "/libnccl.so" in line})
    return {
        "version": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "library": files[0] if files else None,
    }


print(json.dumps(probe()))
