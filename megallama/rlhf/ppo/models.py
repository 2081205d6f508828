"""The models of PPO on one mesh: two that learn, a frozen reference, and the judges; idle ones wait in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain

from torch import Tensor

from megallama.checkpoint.formats import Source
from megallama.config import Config, ModelConfig
from megallama.inference.consolidate import Consolidation, generation_mesh
from megallama.parallel.pieces import Slot
from megallama.rlhf.judges import Judges, judge_source, open_judge
from megallama.runtime.mesh import Mesh
from megallama.train.models import adopt, agreed, frozen, mesh_for, open_weights, scored
from megallama.train.residence import Residence
from megallama.train.run import starting_weights
from megallama.train.trainer import Trainer, empty_trainer

CRITIC = "critic"
"""Name of the critic in checkpoints, beside the actor."""


class Models:
    """Actor, critic, reference and judges with the weights that the configuration names. Collective.

    Args:
        config: with the actor's shape, and train.steps in iterations.

    Attributes:
        actor, critic: trained.
        reference: the policy at the start, frozen.
        judges: the reward models.
        sources: where the reference and the judges come from, by name.
        watch: a further reward model that trains nobody, or None.
        consolidation: the actor in the generation layout.

    Raises:
        ValueError: a folder is missing, damaged, or holds another kind of model.
    """

    def __init__(self, config: Config, mesh: Mesh):
        start = starting_weights(config.checkpoint.load)
        if start is None:
            raise ValueError(
                f"checkpoint.load={config.checkpoint.load}: name the policy that ppo starts from and stays close to as "
                f"weights:FOLDER, also when a run goes on"
            )
        policy = open_weights(start)
        self.sources: dict[str, Source] = {"the policy at the start": policy}
        plain, vocabulary = (
            replace(config, model=ModelConfig()),
            config.model.vocab_size,
        )  # judges have their own shapes
        self.judges = Judges(plain, mesh, vocabulary)
        self.watch = open_judge("watch", plain, mesh, vocabulary)
        for name in ("helpfulness", "safety"):
            judge = judge_source(name, plain, mesh.world.size, vocabulary)
            if judge is not None:
                self.sources[f"judges.{name}"] = judge
        self._slots: dict[int, list[tuple[Slot, dict[str, Tensor]]]] = {}
        self._residences: dict[int, Residence] = {}  # each leaves before the next one comes
        self.reference = self._housed(frozen(config, mesh, policy))
        self.actor = self._housed(_started(_updates(config), mesh, policy))
        values = scored(open_weights(config.ppo.critic or config.judges.helpfulness or ""), config.train.seed)
        learner = adopt(_updates(plain), values.model, values.folder)
        if config.ppo.critic_lr is not None:
            learner = replace(learner, optim=replace(learner.optim, lr=config.ppo.critic_lr))
        self.critic = self._housed(_started(learner, mesh_for(values.model, mesh), values))
        tp = config.generate.tp or config.parallel.tp
        self.consolidation = Consolidation(self.actor, generation_mesh(self.actor.config, tp, mesh))

    def _housed(self, trainer: Trainer) -> Trainer:
        if trainer.optimizer is not None:  # views of memory that is about to leave: they stay valid
            self._slots[id(trainer)] = list(trainer.optimizer.slots())
        self._residences[id(trainer)] = Residence(trainer)
        return trainer

    def reading(self, trainer: Trainer) -> AbstractContextManager[None]:
        """Context in which the weights of actor, critic or reference are on the device."""
        return self._residences[id(trainer)].reading()

    def training(self, trainer: Trainer) -> AbstractContextManager[None]:
        """Context in which all of actor or critic is on the device."""
        return self._residences[id(trainer)].training()

    def _at_rest(self, trainer: Trainer) -> Iterator[tuple[Slot, dict[str, Tensor]]]:
        residence = self._residences[id(trainer)]
        for slot, states in self._slots[id(trainer)]:
            yield slot, {name: residence.at_rest(view) for name, view in states.items()}

    def slots(self) -> Iterator[tuple[Slot, dict[str, Tensor]]]:
        """What a checkpoint holds, where it lies while nobody works: the actor, and the critic under its own names."""
        beside = ((slot._replace(name=f"{CRITIC}.{slot.name}"), states) for slot, states in self._at_rest(self.critic))
        return chain(self._at_rest(self.actor), beside)

    def actor_weights(self) -> Iterator[tuple[Slot, dict[str, Tensor]]]:
        """The actor without its optimizer."""
        return ((slot, {"weight": states["weight"]}) for slot, states in self._at_rest(self.actor))

    def publish(self) -> None:
        """After slots have been loaded. Collective."""
        for trainer in (self.actor, self.critic):
            assert trainer.optimizer is not None, "both are trained"
            with self.training(trainer):
                trainer.optimizer.publish()


def updates(config: Config) -> int:
    """Gradient steps of one iteration."""
    return config.ppo.rollouts // config.train.global_batch_size


def _updates(config: Config) -> Config:
    """The configuration with train.steps in gradient steps, as the learning rate's schedule counts them."""
    return replace(config, train=replace(config.train, steps=config.train.steps * updates(config)))


def _started(config: Config, mesh: Mesh, source: Source) -> Trainer:
    trainer = empty_trainer(config, mesh)
    assert trainer.optimizer is not None, "it is to be trained"
    trainer.optimizer.load_weights(agreed(source, mesh).read)
    return trainer
