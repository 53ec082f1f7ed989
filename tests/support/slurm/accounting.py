"""Accounting for the test cluster: a MariaDB and a slurmdbd, processes of its own, all their files in its folder."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from support.slurm.cluster import Cluster

PROGRAMS = ("mariadbd", "mariadb-install-db", "slurmdbd", "sacctmgr", "sacct")
DAEMONS = ("slurmdbd", "mariadbd")
"""In the order in which they are stopped."""


def missing(path: str) -> str | None:
    """Why there can be none; None when there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    install = "apt-get install --no-install-recommends slurmdbd mariadb-server"
    return f"{', '.join(absent)} not installed: {install}" if absent else None


def ports(cluster: Cluster) -> tuple[int, int]:
    """Of the database and of slurmdbd."""
    return 18880 + 100 * cluster.id, 18881 + 100 * cluster.id


def start(cluster: Cluster) -> None:
    """Database first, then slurmdbd, which makes its tables; the controller comes after."""
    from support.slurm.cluster import until

    data, password = cluster.state / "database", os.urandom(16).hex()
    cluster.run("mariadb-install-db", "--no-defaults", f"--datadir={data}", "--user=root", "--skip-test-db")
    secret(cluster, "users.sql", f"CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY '{password}';\n"
                                 "GRANT ALL ON *.* TO 'slurm'@'127.0.0.1';\n")  # fmt: skip
    secret(cluster, "slurmdbd.conf", slurmdbd_conf(cluster, password))
    database, _ = ports(cluster)
    # slurmdbd has no key for a socket's path.
    cluster._start("mariadbd", "mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-name-resolve",
                   f"--socket={cluster.state}/database.socket", f"--pid-file={cluster.state}/database.pid",
                   "--bind-address=127.0.0.1", f"--port={database}", f"--init-file={cluster.state}/users.sql",
                   "--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=64M")  # fmt: skip
    ping = ("mariadb-admin", "--no-defaults", f"--socket={cluster.state}/database.socket", "--user=root", "ping")
    until(lambda: cluster.ok(*ping), "mariadbd", 30)
    cluster._start("slurmdbd", "slurmdbd", "-D")
    until(lambda: cluster.ok("sacctmgr", "--noheader", "show", "cluster"), "slurmdbd", 30)
    manage(cluster, "add", "cluster", f"everstep{cluster.id}")


def manage(cluster: Cluster, *words: str) -> None:
    """What an admin tells sacctmgr."""
    cluster.run("sacctmgr", "--immediate", "--quiet", *words)


def secret(cluster: Cluster, name: str, text: str) -> None:
    file = cluster.state / name
    file.touch(mode=0o600)
    file.write_text(text)


def slurmdbd_conf(cluster: Cluster, password: str) -> str:
    database, own = ports(cluster)
    return f"""\
AuthType=auth/munge
AuthInfo=socket={cluster.state}/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={own}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=slurm
StoragePass={password}
StorageLoc=accounting
LogFile={cluster.state}/log/slurmdbd.log
PidFile={cluster.state}/slurmdbd.pid
"""


def slurm_conf(cluster: Cluster) -> str:
    """As a site has it that lets nobody compute without an account; what is over is forgotten after seconds."""
    return f"""\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports(cluster)[1]}
# For munge this "password" is the path of its socket.
AccountingStoragePass={cluster.state}/munge/socket
AccountingStorageEnforce=associations,limits,qos
AccountingStoreFlags=job_comment,job_script
"""
