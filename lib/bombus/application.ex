defmodule Bombus.Application do
  @moduledoc false

  use Application

  @impl true
  def start(_type, _arguments) do
    children = [Bombus.Serving.Requests | Bombus.Telemetry.children()]
    Supervisor.start_link(children, strategy: :one_for_one)
  end
end
