"""Network namespaces on a bridge of our own: real packets, dropped in one direction by iptables. Needs root."""

import subprocess

BRIDGE = "tandem-faults"
OURS = "10.77.0.254"


def sh(*command, check=True):
    return subprocess.run(command, check=check, capture_output=True, text=True)


class Network:
    """One namespace for each name; the rest of the check runs outside, at OURS."""

    def __init__(self, names):
        self.names = list(names)
        self.close()
        sh("ip", "link", "add", BRIDGE, "type", "bridge")
        sh("ip", "addr", "add", f"{OURS}/24", "dev", BRIDGE)
        sh("ip", "link", "set", BRIDGE, "up")
        for number, name in enumerate(self.names):
            space, outer = self.space(name), f"tf{number}"
            sh("ip", "netns", "add", space)
            sh("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            sh("ip", "link", "set", outer, "master", BRIDGE, "up")
            for inner in (["addr", "add", f"{self.address(name)}/24", "dev", "eth0"], ["link", "set", "eth0", "up"],
                          ["link", "set", "lo", "up"]):
                sh("ip", "-n", space, *inner)

    def space(self, name):
        return f"tandem-{name}"

    def address(self, name):
        return f"10.77.0.{1 + self.names.index(name)}"

    def hosts(self):
        return {name: (self.address(name), ["ip", "netns", "exec", self.space(name)]) for name in self.names}

    def deaf(self, name, to=None):
        """From now on `name` hears nothing from `to`, or from nobody; what it says arrives."""
        self.drop(name, "INPUT", "-s", to)

    def dumb(self, name, to=None):
        """From now on `to`, or nobody, hears anything from `name`; what they say arrives."""
        self.drop(name, "OUTPUT", "-d", to)

    def drop(self, name, chain, flag, other):
        rule = [flag, OURS if other == "us" else self.address(other)] if other else ["!", flag, self.address(name)]
        sh("ip", "netns", "exec", self.space(name), "iptables", "-A", chain, *rule, "-j", "DROP")

    def heal(self):
        for name in self.names:
            sh("ip", "netns", "exec", self.space(name), "iptables", "-F")

    def close(self):
        for name in self.names:
            sh("ip", "netns", "del", self.space(name), check=False)
        sh("ip", "link", "del", BRIDGE, check=False)
