# Stands in for `:telemetry` where that is not on the path: this package has no dependencies. With
# the real one (on ERL_LIBS) the same tests run.
defmodule :telemetry do
  @moduledoc false

  def attach_many(id, events, handler, config) do
    for event <- events, do: :persistent_term.put({__MODULE__, event}, {id, handler, config})
    :ok
  end

  def detach(id) do
    for {{__MODULE__, _event} = key, {^id, _handler, _config}} <- :persistent_term.get(),
        do: :persistent_term.erase(key)

    :ok
  end

  def execute(event, measurements, metadata) do
    with {_id, handler, config} <- :persistent_term.get({__MODULE__, event}, nil) do
      handler.(event, measurements, metadata, config)
    end

    :ok
  end
end
