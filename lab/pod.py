"""Pods in the lab of `make up`, for people without a CRI client at hand.

python -m lab.pod run redis criproxy.io/scaledown-duration=10s     # prints the pod's address
python -m lab.pod list
python -m lab.pod remove redis
"""

import argparse
import sys
from collections.abc import Sequence

import grpc

from criproxy.api import cri_pb2 as cri
from lab import LabError, recipes
from lab.daemon import Daemon
from lab.kubelet import Kubelet
from lab.up import lab


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.pod", description="Pods in the lab of `make up`")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run a pod with one container")
    run.add_argument("image", help=f"one of {', '.join(recipes.RECIPES)}, or any that containerd has")
    run.add_argument("annotations", nargs="*", metavar="KEY=VALUE", help="the pod's annotations")
    run.add_argument("--name", help="the pod's name (default: the image's)")
    run.add_argument("--command", dest="argv", nargs=argparse.REMAINDER, default=[], help="what it runs instead")
    commands.add_parser("list", help="show the pods")
    remove = commands.add_parser("remove", help="stop and remove pods")
    remove.add_argument("names", nargs="+", metavar="NAME")
    options = parser.parse_args(arguments)
    try:
        containerd = lab()
        # Not as a context: leaving that would remove the pods.
        kubelet = Kubelet(Daemon(containerd).endpoint, containerd)
        if options.command == "run":
            _run(kubelet, options.image, options.name, options.annotations, options.argv)
        elif options.command == "list":
            _list(kubelet)
        else:
            _remove(kubelet, options.names)
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    except grpc.RpcError as error:
        print(f"{error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    return 0


def _run(kubelet: Kubelet, image: str, name: str | None, annotations: list[str], command: list[str]) -> None:
    pairs = dict(annotation.partition("=")[::2] for annotation in annotations)
    pod = kubelet.run_pod(name or image.rsplit("/", 1)[-1].split(":")[0], annotations=pairs)
    pod.run(image, command=command)
    print(f"{pod.name}: {' '.join(pod.ips)}")


def _list(kubelet: Kubelet) -> None:
    for item in _sandboxes(kubelet):
        state = cri.PodSandboxState.Name(item.state).removeprefix("SANDBOX_").lower()
        print(f"{item.metadata.namespace}/{item.metadata.name}\t{state}\t{item.id}")


def _remove(kubelet: Kubelet, names: list[str]) -> None:
    items = {item.metadata.name: item for item in _sandboxes(kubelet)}
    for name in names:
        if name not in items:
            raise LabError(f"There is no pod {name}", f"there are {', '.join(items) or 'none'}")
        kubelet.adopt(items[name]).remove()


def _sandboxes(kubelet: Kubelet) -> list[cri.PodSandbox]:
    answer = kubelet.call("ListPodSandbox", cri.ListPodSandboxRequest(), cri.ListPodSandboxResponse)
    return list(answer.items)


if __name__ == "__main__":
    sys.exit(main())
